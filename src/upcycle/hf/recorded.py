"""Finds the routers of a model, and what corrects their choice of experts.

The routers are our own (`nn.moe.RouterLayer`), or the modules whose `router_logits` transformers records.
"""

from __future__ import annotations

from torch import Tensor, nn

from upcycle.blueprints.stored_types import is_bias
from upcycle.nn.moe import RouterLayer


def routers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the routers of `model` with their names, in module order; empty for a dense model."""
    recorders = (getattr(module, "_can_record_outputs", None) or {} for module in model.modules())
    found = (each["router_logits"].target_class for each in recorders if "router_logits" in each)
    kinds: tuple[type[nn.Module], ...] = (RouterLayer, *found)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def bias_of(router: nn.Module, block: nn.Module) -> Tensor | None:
    """Return the correction bias of a router, or None; the `block` that the router is in may hold it."""
    own = [*router.named_parameters(), *router.named_buffers()]
    beside = [*block.named_parameters(recurse=False), *block.named_buffers(recurse=False)]
    return next((tensor.detach() for name, tensor in [*own, *beside] if is_bias(name)), None)
