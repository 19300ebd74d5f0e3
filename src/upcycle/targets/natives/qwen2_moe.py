"""Qwen2-MoE: the MoE that Qwen2 becomes; it always has a shared expert."""

from upcycle.targets._clients import (
    ACTIVATION,
    DENSE_LAYERS,
    HEAD_DIM,
    NEVER_RENORMALIZED,
    ROPE,
    SOME_WINDOWS,
    TIED,
    WINDOW,
)
from upcycle.targets.native import Growing, Native
from upcycle.targets.natives._qwen import HELD, LAYOUT, SHARED, dense_layers, moe_layers

native = Native(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    reader="Qwen2Tokenizer",
    summary="softmax over all experts, norm_topk_prob, gated shared expert",
    layout=LAYOUT,
    router="mlp.gate.weight",
    fields=(
        "rms_norm_eps",
        "head_dim",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "layer_types",
    ),
    width_field="moe_intermediate_size",
    renormalizes="optional",
    shared=SHARED,
    dense_layers=dense_layers,
    constants={"qkv_bias": True},
    clients={
        "llama.cpp": (NEVER_RENORMALIZED, TIED, DENSE_LAYERS, WINDOW, HEAD_DIM, ACTIVATION),
        "mlx-lm": (NEVER_RENORMALIZED, TIED, DENSE_LAYERS, WINDOW, HEAD_DIM, ROPE, ACTIVATION),
        "vLLM": (SOME_WINDOWS, HEAD_DIM, ACTIVATION),
        "SGLang": (TIED, DENSE_LAYERS, WINDOW, HEAD_DIM, ACTIVATION),
    },
    growing=Growing(
        like="qwen2",
        assumed={
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "norm_topk_prob": False,
            "mlp_only_layers": (),
            "decoder_sparse_step": 1,
            "intermediate_size": 5632,
            "num_key_value_heads": 16,
        },
        moe_layers=moe_layers,
        only={"qkv_bias": True},
        shared_width=lambda config: int(config["shared_expert_intermediate_size"]),
        held=HELD,
        held_router="mlp.gate.weight",
    ),
)
