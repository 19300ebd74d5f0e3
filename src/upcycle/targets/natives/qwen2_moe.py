"""Qwen2-MoE: the MoE that Qwen2 becomes; it always has a shared expert."""

from upcycle.targets.native import Config, Growing, Native, client_limits
from upcycle.targets.natives._qwen import HELD, LAYOUT, SHARED, dense_layers, moe_layers


def _clients(config: Config) -> dict[str, str]:
    out = client_limits(config, mlx_head_dim=False)
    if "sliding_attention" in config["layer_types"]:
        out |= dict.fromkeys(("mlx-lm", "llama.cpp"), "ignores sliding_window in qwen2_moe")
    if config["norm_topk_prob"]:
        never = "never renormalises the top-k weights of qwen2_moe, whatever norm_topk_prob says"
        out |= dict.fromkeys(("llama.cpp", "mlx-lm"), never)
    return out


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
    clients=_clients,
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
