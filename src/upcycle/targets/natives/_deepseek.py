"""The common part of the MoE architectures made like DeepSeek-V3: sigmoid router, bias, shared network."""

from upcycle.targets._layouts import Shared
from upcycle.targets.native import Config
from upcycle.tensors.computed import Fill
from upcycle.tensors.lazy import Lazy

SHARED = Shared(
    path="mlp.shared_experts",
    combine="sum",
    config=lambda *_: {"n_shared_experts": 1},
    mandatory="full",
    experts_wide=lambda _: 1,
)

CONSTANTS = {
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}


def dense_layers(dense: Config, moe_layers: frozenset[int]) -> Config | str:
    """Return the config keys that keep the first layers dense; no others can be."""
    first = min(moe_layers)
    if moe_layers != frozenset(range(first, dense["num_hidden_layers"])):
        return "this architecture can only have its first layers dense"
    return {"first_k_dense_replace": first, "intermediate_size": dense["intermediate_size"]}


def bias(num_experts: int, dtype: str) -> dict[str, Lazy]:
    """Return the bias that corrects the choice of experts, which begins at 0."""
    return {"mlp.gate.e_score_correction_bias": Fill((num_experts,), "F32", 0.0)}
