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
from upcycle.targets.native import Native
from upcycle.targets.natives._qwen import LAYOUT, SHARED, dense_layers

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
)
