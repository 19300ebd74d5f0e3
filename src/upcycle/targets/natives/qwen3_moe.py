"""Qwen3-MoE: the MoE that Qwen3 becomes."""

from upcycle.targets.native import Config, Growing, Native, client_limits
from upcycle.targets.natives._qwen import HELD, LAYOUT, dense_layers, moe_layers


def _clients(config: Config) -> dict[str, str]:
    out = client_limits(config)
    if config["attention_bias"]:
        out |= dict.fromkeys(("mlx-lm", "llama.cpp"), "has no biases in the attention of qwen3_moe")
    if config["use_sliding_window"]:
        out |= dict.fromkeys(("mlx-lm", "llama.cpp"), "ignores sliding_window in qwen3_moe")
    if config["tie_word_embeddings"]:
        out["SGLang"] = "never ties the head of qwen3_moe to its embeddings (moe.untie = true stores a head)"
    if not config["norm_topk_prob"]:
        out["llama.cpp"] = "always renormalises the top-k weights of qwen3_moe"
    return out


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
    clients=_clients,
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
