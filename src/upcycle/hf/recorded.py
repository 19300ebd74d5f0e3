"""Finds the routers of a transformers model: the modules whose `router_logits` transformers records."""

from __future__ import annotations

from torch import nn


def routers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the routers of `model` with their names, in module order; empty for a dense model."""
    for module in model.modules():
        recorders = getattr(module, "_can_record_outputs", None) or {}
        if "router_logits" in recorders:
            kind = recorders["router_logits"].target_class
            return [(name, m) for name, m in model.named_modules() if isinstance(m, kind)]
    return []
