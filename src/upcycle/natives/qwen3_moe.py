"""Qwen3-MoE: the MoE that Qwen3 becomes."""

from upcycle.natives import Native
from upcycle.natives._qwen import LAYOUT, dense_layers

native = Native(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
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
)  # fmt: skip
