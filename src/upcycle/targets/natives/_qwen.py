"""The common part of the Qwen MoE architectures: names per expert, dense layers, the shared expert."""

from upcycle.targets._layouts import PerExpert, Shared
from upcycle.targets.native import Config

LAYOUT = PerExpert(path="mlp.experts.{e}", gate="gate_proj", up="up_proj", down="down_proj")

SHARED = Shared(
    path="mlp.shared_expert",
    gate="mlp.shared_expert_gate.weight",
    combine="gated",
    config=lambda width, _: {"shared_expert_intermediate_size": width},
    mandatory="narrow",
)


def dense_layers(dense: Config, moe_layers: frozenset[int]) -> Config:
    """Return the config keys that keep layers dense; `mlp_only_layers` can name any of them."""
    kept = [i for i in range(dense["num_hidden_layers"]) if i not in moe_layers]
    return {
        "mlp_only_layers": kept,
        "decoder_sparse_step": 1,
        "intermediate_size": dense["intermediate_size"],
    }
