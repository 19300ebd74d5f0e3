"""The routers of a model of transformers: the modules that transformers records `router_logits` of."""

from __future__ import annotations

from torch import nn


def routers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The routers of `model` with their names, in the order of its modules; none if it is dense."""
    for module in model.modules():
        recorders = getattr(module, "_can_record_outputs", None) or {}
        if "router_logits" in recorders:
            kind = recorders["router_logits"].target_class
            return [(name, m) for name, m in model.named_modules() if isinstance(m, kind)]
    return []
