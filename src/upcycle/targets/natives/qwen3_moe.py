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
from upcycle.targets.native import Growing, Native
from upcycle.targets.natives._qwen import HELD, LAYOUT, dense_layers, moe_layers

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
    growing=Growing(
        like="qwen3",
        assumed={
            "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
            "norm_topk_prob": False, "mlp_only_layers": (), "decoder_sparse_step": 1,
            "intermediate_size": 6144, "num_key_value_heads": 4, "head_dim": None,
        },
        other_names={"num_local_experts": "num_experts"},
        moe_layers=moe_layers,
        held=HELD,
        held_router="mlp.gate.weight",
    ),
)  # fmt: skip
