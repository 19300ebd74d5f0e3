"""The common part of the Qwen MoE architectures: names per expert, dense layers, the shared expert."""

from upcycle.targets._layouts import Fused, PerExpert, Shared
from upcycle.targets.native import Config

LAYOUT = PerExpert(path="mlp.experts.{e}", gate="gate_proj", up="up_proj", down="down_proj")

HELD = Fused(gate_up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj")

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


def moe_layers(config: Config) -> frozenset[int]:
    """Return the layers that have experts, by the keys that `dense_layers` sets."""
    kept, step = config["mlp_only_layers"] or (), config["decoder_sparse_step"]
    layers = range(config["num_hidden_layers"])
    return frozenset(i for i in layers if i not in kept and (i + 1) % step == 0)
