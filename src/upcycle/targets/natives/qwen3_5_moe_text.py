"""Qwen3.5-MoE, text: the MoE that Qwen3.5 becomes; it always renormalises and always has a shared expert."""

from dataclasses import replace

from upcycle.targets._clients import ACTIVATION, BIASES, Gap, always
from upcycle.targets._layouts import FusedOrEach
from upcycle.targets.native import Native
from upcycle.targets.natives._qwen import LAYOUT, SHARED

_INSIDE = replace(always("only within a qwen3_5_moe", "knows the type inside qwen3_5_moe only"), alone=True)
_EVERY_FOURTH = Gap(
    "full attention in other layers than every fourth",
    "has full attention in every fourth layer of {name}, whatever layer_types says",
    lambda config: any(
        (kind == "full_attention") != (i % 4 == 3) for i, kind in enumerate(config["layer_types"])
    ),
)

native = Native(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    reader="Qwen3_5Tokenizer always",
    base="Qwen3_5MoeTextModel",
    summary="softmax over all experts, top-k renormalised, gated shared expert",
    # The hub stores its experts fused; mlx-lm and older versions of transformers read nothing else.
    layout=FusedOrEach(
        gate_up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj", each=LAYOUT
    ),
    router="mlp.gate.weight",
    fields=(
        "rms_norm_eps", "head_dim", "attention_bias", "layer_types", "linear_conv_kernel_dim",
        "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads",
    ),
    width_field="moe_intermediate_size",
    renormalizes="always",
    shared=SHARED,
    clients={
        "llama.cpp": (BIASES, ACTIVATION),
        "mlx-lm": (_INSIDE,),
        "vLLM": (BIASES, ACTIVATION),
        "SGLang": (_EVERY_FOURTH, BIASES, ACTIVATION),
    },
)  # fmt: skip
