"""Cohere2-MoE: the MoE that Cohere 2 becomes."""

from upcycle.targets._clients import ABSENT, ACTIVATION, BIASES, DENSE_LAYERS, UNTIED
from upcycle.targets._layouts import Shared
from upcycle.targets.native import Config, Native
from upcycle.targets.natives._qwen import LAYOUT


def _dense_layers(dense: Config, moe_layers: frozenset[int]) -> Config:
    kinds = ["sparse" if i in moe_layers else "dense" for i in range(dense["num_hidden_layers"])]
    return {
        "mlp_layer_types": kinds,
        "prefix_dense_intermediate_size": dense["intermediate_size"],
        # With the default, 1, dense layers would be rotated even if the dense model does not rotate them.
        "prefix_dense_sliding_window_pattern": 2,
    }


native = Native(
    model_type="cohere2_moe",
    architecture="Cohere2MoeForCausalLM",
    summary="softmax over the chosen experts",
    layout=LAYOUT,
    router="mlp.gate.weight",
    fields=("layer_norm_eps", "logit_scale", "head_dim", "attention_bias", "sliding_window", "layer_types"),
    renormalizes="always",
    shared=Shared(
        path="mlp.shared_experts",
        combine="average",
        config=lambda _, count: {
            "num_shared_experts": count,
            "shared_expert_combination_strategy": "average",
        },
        experts_wide=lambda count: count,
    ),
    dense_layers=_dense_layers,
    constants={"expert_selection_fn": "softmax", "norm_topk_prob": True},
    clients={
        "llama.cpp": (BIASES, ACTIVATION),
        "mlx-lm": (ABSENT,),
        "vLLM": (BIASES, UNTIED, ACTIVATION),
        "SGLang": (DENSE_LAYERS, BIASES, UNTIED, ACTIVATION),
    },
)
