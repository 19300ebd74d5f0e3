"""Qwen3-MoE: the MoE that Qwen3 becomes."""

from upcycle.targets.native import Config, Native, client_limits
from upcycle.targets.natives._qwen import LAYOUT, dense_layers


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
)  # fmt: skip
