"""Qwen3-MoE: the MoE that Qwen3 becomes."""

from upcycle.targets._clients import (
    ACTIVATION,
    ALWAYS_RENORMALIZED,
    BIASES,
    DENSE_LAYERS,
    OUTPUT_BIAS,
    ROPE,
    TIED,
    WINDOW,
)
from upcycle.targets.native import Native
from upcycle.targets.natives._qwen import LAYOUT, dense_layers

native = Native(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    reader="Qwen2Tokenizer",
    summary="softmax over all experts, norm_topk_prob",
    layout=LAYOUT,
    router="mlp.gate.weight",
    fields=(
        "rms_norm_eps", "head_dim", "attention_bias", "use_sliding_window", "sliding_window",
        "max_window_layers",
    ),
    width_field="moe_intermediate_size",
    renormalizes="optional",
    dense_layers=dense_layers,
    clients={
        "llama.cpp": (ALWAYS_RENORMALIZED, DENSE_LAYERS, WINDOW, BIASES, ACTIVATION),
        "mlx-lm": (WINDOW, BIASES, ROPE, ACTIVATION),
        "vLLM": (OUTPUT_BIAS, ACTIVATION),
        "SGLang": (TIED, DENSE_LAYERS, WINDOW, ACTIVATION),
    },
)  # fmt: skip
