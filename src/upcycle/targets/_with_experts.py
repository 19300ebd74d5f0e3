"""The common part of the targets with experts, in which some blocks are MoE layers."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from upcycle.families import Config, Weights
from upcycle.families._weights import Weight
from upcycle.targets import Target
from upcycle.tensors.entries import Entry

if TYPE_CHECKING:
    from upcycle.dense.source import Dense
    from upcycle.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class WithExperts(Target):
    """A model with experts in some of its blocks."""

    kind: ClassVar[str] = "MoE"
    has_experts: ClassVar[bool] = True

    def weights(self, dense: Dense, config: Config, entries: Mapping[str, Entry]) -> Weights:
        """Return what the family says about the tensors that stay, and this target about those it makes."""
        known = dense.weights
        return {
            name: known[name] if name in known else self.made(name, entry.shape)
            for name, entry in entries.items()
        }

    @abc.abstractmethod
    def made(self, name: str, shape: tuple[int, ...]) -> Weight:
        """Return the kind of a tensor that the dense model does not have."""

    @classmethod
    def moments(cls, recipe: Recipe) -> Recipe:
        """Return a recipe with experts as copies and a zero router, because routers have no moments yet."""
        table = super().moments(recipe).as_table()
        table["router"] |= {"init": "zeros"}
        return type(recipe).of(table)

    def origin(self, recipe: Recipe) -> str:
        """Return the initialisation of the experts."""
        return f"initialisation `{recipe.init.name}`"

    @classmethod
    def label(cls, recipe: Mapping[str, Any]) -> str:
        """Return how many experts a token is routed to, and how."""
        moe, router = recipe["moe"], (recipe.get("router") or {}).get("name", "top_k")
        way = f"top-{moe.get('top_k')}" if router == "top_k" else str(router).replace("_", " ")
        return f"{moe.get('num_experts')} experts, {way}"
