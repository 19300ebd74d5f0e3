"""LFM2-MoE: the MoE that LFM2 becomes."""

from upcycle.targets._clients import ACTIVATION, ROPE, UNTIED, Gap
from upcycle.targets._layouts import PerExpert
from upcycle.targets.native import Native
from upcycle.tensors.computed import Fill
from upcycle.tensors.lazy import Lazy


def _bias(num_experts: int, dtype: str) -> dict[str, Lazy]:
    return {"feed_forward.expert_bias": Fill((num_experts,), "F32", 0.0)}


_CONVOLUTION_BIAS = Gap(
    "biases of convolutions",
    "has no biases in the convolutions of {name}",
    lambda config: bool(config["conv_bias"]),
)

native = Native(
    model_type="lfm2_moe",
    architecture="Lfm2MoeForCausalLM",
    summary="sigmoid, top-k renormalised, correction bias",
    layout=PerExpert(
        path="feed_forward.experts.{e}", gate="w1", up="w3", down="w2", in_memory="feed_forward.experts"
    ),
    part="feed_forward",
    network={"gate": "w1", "up": "w3", "down": "w2"},
    router="feed_forward.gate.weight",
    fields=("intermediate_size", "norm_eps", "conv_bias", "conv_L_cache", "layer_types"),
    width_field="moe_intermediate_size",
    renormalizes="always",
    added=1e-6,
    constants={
        "num_dense_layers": 0, "use_expert_bias": True, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
    },
    clients={
        "llama.cpp": (UNTIED, _CONVOLUTION_BIAS, ACTIVATION),
        "mlx-lm": (UNTIED, ROPE, ACTIVATION),
        "vLLM": (UNTIED, ACTIVATION),
        "SGLang": (ACTIVATION,),
    },
    extra=_bias,
)  # fmt: skip
