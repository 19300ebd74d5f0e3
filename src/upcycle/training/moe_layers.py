"""The places of MoE layers, routers and experts in a model, as prefixes of the names of parameters.

Roles, parts and rates of parameters all ask here, so that one file knows what an expert is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from upcycle.nn.moe import MoE


@dataclass(frozen=True, kw_only=True)
class ExpertStack:
    """The experts of a layer that one module stacks, each number of the first axis being one."""

    prefix: str  # of its parameters
    count: int
    first: int  # the number of its first expert in the layer


def layers(routers: Iterable[str]) -> tuple[str, ...]:
    """Return the prefixes of the MoE layers, for the names of their routers."""
    return tuple(f"{name.rpartition('.')[0]}." for name in routers)


def stacks(model: nn.Module, routers: Iterable[str]) -> list[ExpertStack]:
    """Return the stacks of routed experts, for the names of the routers; shared experts are none."""
    out = []
    for layer in layers(routers):
        module = model.get_submodule(layer.rstrip("."))
        first = 0
        for own in ("experts", "universal") if isinstance(module, MoE) else ("experts",):
            if (stack := getattr(module, own)) is not None:
                count = next(p.shape[0] for p in stack.parameters())
                out.append(ExpertStack(prefix=f"{layer}{own}.", count=count, first=first))
                first += count
    return out
