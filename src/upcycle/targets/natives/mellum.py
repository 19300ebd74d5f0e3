"""Mellum: Qwen3-MoE with windows in some layers; the MoE that such a Qwen3 becomes."""

from upcycle.targets._clients import ABSENT, ACTIVATION, TIED
from upcycle.targets.native import Config, Native
from upcycle.targets.natives._qwen import LAYOUT


def _dense_layers(dense: Config, moe_layers: frozenset[int]) -> Config:
    kinds = ["sparse" if i in moe_layers else "dense" for i in range(dense["num_hidden_layers"])]
    return {"mlp_layer_types": kinds, "intermediate_size": dense["intermediate_size"]}


def _rope_by_kind(config: Config) -> Config:
    """Return the rotary settings as a table with one entry per kind of layer, as its class reads them."""
    rope = config["rope_parameters"]
    kept = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    return kept | {"rope_parameters": {kind: dict(rope) for kind in sorted(set(config["layer_types"]))}}


native = Native(
    model_type="mellum",
    architecture="MellumForCausalLM",
    summary="softmax over all experts, norm_topk_prob; windows by layer",
    layout=LAYOUT,
    router="mlp.gate.weight",
    fields=("rms_norm_eps", "head_dim", "attention_bias", "sliding_window", "layer_types"),
    width_field="moe_intermediate_size",
    renormalizes="optional",
    dense_layers=_dense_layers,
    finish=_rope_by_kind,
    clients={
        "llama.cpp": (ABSENT,),
        "mlx-lm": (ABSENT,),
        "vLLM": (ACTIVATION,),
        "SGLang": (TIED, ACTIVATION),
    },
)
