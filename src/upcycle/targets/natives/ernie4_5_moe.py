"""ERNIE 4.5 MoE: the MoE that ERNIE 4.5 becomes; a bias corrects the choice of experts."""

from upcycle.targets._clients import ACTIVATION, ROPE, Gap
from upcycle.targets._layouts import Shared
from upcycle.targets.native import Config, Native
from upcycle.targets.natives._qwen import LAYOUT
from upcycle.tensors.computed import Fill
from upcycle.tensors.lazy import Lazy


def _dense_layers(dense: Config, moe_layers: frozenset[int]) -> Config | str:
    layers = dense["num_hidden_layers"]
    first, last = min(moe_layers), max(moe_layers)
    for interval in range(1, layers + 1):
        if moe_layers == {i for i in range(first, last + 1) if (i + 1) % interval == 0}:
            return {
                "moe_layer_start_index": first,
                "moe_layer_end_index": last,
                "moe_layer_interval": interval,
                "intermediate_size": dense["intermediate_size"],
            }
    return "ernie4_5_moe can only have every n-th layer between two layers as MoE"


def _bias(num_experts: int, dtype: str) -> dict[str, Lazy]:
    return {"mlp.moe_statics.e_score_correction_bias": Fill((1, num_experts), "F32", 0.0)}


_ROUTER = (".mlp.gate.", ".mlp.moe_statics.")  # in float32 in a model of any type
_SHARED_WIDTH = Gap(
    "shared experts",
    "guesses the width of the shared expert of {name} and refuses this one",
    lambda config: bool(config["moe_num_shared_experts"]),
)

native = Native(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    reader="TokenizersBackend",
    summary="softmax over all experts, top-k renormalised, correction bias",
    layout=LAYOUT,
    router="mlp.gate.weight",
    fields=("rms_norm_eps", "head_dim", "use_bias"),
    num_experts_field="moe_num_experts",
    top_k_field="moe_k",
    width_field="moe_intermediate_size",
    renormalizes="always",
    shared=Shared(
        path="mlp.shared_experts",
        combine="sum",
        config=lambda _, count: {"moe_num_shared_experts": count},
        experts_wide=lambda count: count,
    ),
    dense_layers=_dense_layers,
    constants={"moe_norm_min": 1e-12},
    clients={
        "llama.cpp": (_SHARED_WIDTH, ACTIVATION),
        "mlx-lm": (ROPE, ACTIVATION),
        "vLLM": (ACTIVATION,),
        "SGLang": (ACTIVATION,),
    },
    extra=_bias,
    wide_router={"mixed": _ROUTER, "bfloat16": _ROUTER},
)
