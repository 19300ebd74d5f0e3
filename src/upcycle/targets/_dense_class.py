"""The common part of the targets without experts, which are dense classes of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from upcycle.families import Config, Weights
from upcycle.families._weights import Weight
from upcycle.init import Site
from upcycle.targets import Target, dense_snippet
from upcycle.tensors.entries import Entry

if TYPE_CHECKING:
    from upcycle.dense.source import Dense
    from upcycle.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class DenseClass(Target):
    """A dense class of transformers."""

    has_experts: ClassVar[bool] = False

    model_type: str
    architecture: str

    def sites(self, dense: Dense, recipe: Recipe) -> tuple[Site, ...]:
        """Return no blocks, because none becomes an MoE layer."""
        return ()

    def weights(self, dense: Dense, config: Config, entries: Mapping[str, Entry]) -> Weights:
        """Return what the family says about a dense model of that config, or else the shapes alone."""
        family = dense.family
        whole = family.config(self.own_config(config))
        listed = family.weights(whole) | family.optional(whole)
        return {name: listed.get(name) or Weight(entry.shape) for name, entry in entries.items()}

    def snippet(self, config: Mapping[str, Any]) -> str:
        """Return Python code that opens the folder."""
        return dense_snippet(self.architecture)
