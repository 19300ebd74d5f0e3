"""The dense class itself, but narrower: the successor of a larger model, without experts.

Weight Selection (Xu et al., ICLR 2024) chooses its weights from those of the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from upcycle.errors import UpcycleError
from upcycle.families import Config
from upcycle.init import Site
from upcycle.targets import refuse_experts
from upcycle.targets._dense_class import DenseClass
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.blueprints.blueprint import Blueprint
    from upcycle.dense.source import Dense
    from upcycle.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Narrower(DenseClass):
    """The dense class with fewer channels."""

    kind: ClassVar[str] = "narrower"
    summary: str = "the dense class, narrower: weights chosen out of the source (Weight Selection)"
    needs: ClassVar[str] = "[successor], an initialisation that chooses"

    def admit(self, dense: Dense, recipe: Recipe) -> None:
        """Raise `UpcycleError` if the recipe names no successor, or asks for experts."""
        if recipe.successor is None:
            raise UpcycleError("moe.target = dense is the smaller model of [successor]; add that section")
        refuse_experts(recipe, ("moe", "router"))

    def config(self, dense: Dense, recipe: Recipe, sites: tuple[Site, ...]) -> Config:
        """Return config.json of the successor."""
        return dict(dense.raw)

    def tensors(self, models: list[Dense], recipe: Recipe, sites: tuple[Site, ...]) -> dict[str, Lazy]:
        """Return every tensor of the successor by its name on disk."""
        return models[0].tensors

    def warnings(self, built: Blueprint) -> list[str]:
        """Warn that the function is not kept."""
        return ["weights are left out: the function is not kept, and the model has to be trained"]

    def origin(self, recipe: Recipe) -> str:
        """Return the initialisation that chose the weights."""
        return f"initialisation `{recipe.init.name}`"

    @classmethod
    def label(cls, recipe: Mapping[str, Any]) -> str:
        """Return the initialisation that chose the weights."""
        return f"narrower dense, {(recipe.get('init') or {}).get('name', 'copy')}"


target = Narrower


def of(dense: Dense, recipe: Recipe) -> Narrower:
    """Return the narrower twin of the dense class."""
    return Narrower(model_type=dense.family.model_type, architecture=dense.own_class)
