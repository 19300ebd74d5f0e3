"""Mixture-of-Experts layers for the dense models of transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upcycle.nn.experts import Experts
    from upcycle.nn.moe import MoE

__all__ = ["Experts", "MoE"]

_HOMES = {"Experts": "experts", "MoE": "moe"}


def __getattr__(name: str) -> Any:
    # Import torch only on use: a conversion reads the settings of routers without it.
    if name not in _HOMES:
        raise AttributeError(f"module 'upcycle.nn' has no attribute {name!r}")
    return getattr(import_module(f"upcycle.nn.{_HOMES[name]}"), name)
