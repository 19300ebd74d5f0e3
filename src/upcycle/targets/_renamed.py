"""A target under other names: in a model around it, or without a head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from upcycle import targets
from upcycle.families import Config, Family, Weights
from upcycle.families._names import Names
from upcycle.families._training import Trained
from upcycle.families._weights import Initial, Weight
from upcycle.init import Site
from upcycle.nn.routers import Router
from upcycle.targets import Block, Target
from upcycle.tensors.entries import Entry
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.blueprints.blueprint import Blueprint
    from upcycle.dense.source import Dense
    from upcycle.recipe import Recipe
    from upcycle.targets._layouts import MoeNames


@dataclass(frozen=True, kw_only=True)
class Renamed(Target):
    """Another target whose tensors have other names on disk."""

    inner: Target
    names: Names

    model_type: str
    architecture: str
    summary: str = "a target within another model"

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.inner.kind

    @property
    def computes(self) -> str:
        return self.inner.computes

    @property
    def has_experts(self) -> bool:  # type: ignore[override]
        return self.inner.has_experts

    @property
    def gathers_ends(self) -> bool:  # type: ignore[override]
        return self.inner.gathers_ends

    @property
    def wide_router(self) -> Mapping[str, tuple[str, ...]]:  # type: ignore[override]
        return self.inner.wide_router

    @property
    def has_own_routers(self) -> bool:  # type: ignore[override]
        return self.inner.has_own_routers

    @classmethod
    def listed(cls) -> list[dict[str, str]]:
        """Return no rows, because the source decides on it."""
        return []

    def own_config(self, config: Mapping[str, Any]) -> Config:
        """Return the config of the model inside."""
        return self.inner.own_config(config)

    def admit(self, dense: Dense, recipe: Recipe) -> None:
        """Ask the target inside."""
        self.inner.admit(dense, recipe)

    def sites(self, dense: Dense, recipe: Recipe) -> tuple[Site, ...]:
        """Return the blocks of the target inside."""
        return self.inner.sites(dense, recipe)

    def config(self, dense: Dense, recipe: Recipe, sites: tuple[Site, ...]) -> Config:
        """Return config.json of the target inside, which names the class of this one."""
        return {**self.inner.config(dense, recipe, sites), "architectures": [self.architecture]}

    def tensors(self, models: list[Dense], recipe: Recipe, sites: tuple[Site, ...]) -> dict[str, Lazy]:
        """Return the tensors of the target inside by their names on disk."""
        made = self.inner.tensors(models, recipe, sites)
        return {self.names.stored(name): tensor for name, tensor in made.items()}

    def weights(self, dense: Dense, config: Config, entries: Mapping[str, Entry]) -> Weights:
        """Return what the target inside says; of other tensors, only the shape is known."""
        inside, rest = self._parts(entries)
        known = self.inner.weights(dense, self.own_config(config), inside)
        out: Weights = {self.names.stored(name): weight for name, weight in known.items()}
        return out | {name: Weight(entry.shape) for name, entry in rest.items()}

    def begins(
        self, family: Trained, dense: Dense, name: str, weight: Weight, entry: Entry
    ) -> Initial | None:
        """Ask the target inside; None for the other tensors."""
        own = self.names.own(name)
        return None if own is None else self.inner.begins(family, dense, own, weight, entry)

    def layers(self, config: Mapping[str, Any], tensors: Mapping[str, Lazy], folder: Path) -> list[Block]:
        """Return the blocks of the target inside."""
        inside, _ = self._parts(tensors)
        return self.inner.layers(self.own_config(config), inside, folder)

    def dense_config(self, config: Mapping[str, Any]) -> Config | None:
        """Return that of the target inside."""
        return self.inner.dense_config(self.own_config(config))

    def layer_names(self) -> MoeNames | None:
        """Ask the target inside."""
        return self.inner.layer_names()

    def refuse_layout(self, config: Mapping[str, Any], *, tp_size: int, ep_size: int) -> None:
        """Ask the target inside."""
        self.inner.refuse_layout(self.own_config(config), tp_size=tp_size, ep_size=ep_size)

    def own(self, name: str) -> str | None:
        """Return the name in the model inside, or None for what is around it."""
        return self.names.own(name)

    def in_memory(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return the tensors in the shapes in which the class holds them, by names that its loader knows."""
        inside, rest = self._parts(entries)
        return {self.names.stored(n): entry for n, entry in self.inner.in_memory(inside).items()} | rest

    def on_disk(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return the tensors by their names on disk, given as `in_memory` returns them."""
        inside, rest = self._parts(entries)
        return {self.names.stored(n): entry for n, entry in self.inner.on_disk(inside).items()} | rest

    def _parts(self, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the tensors of the model inside by their own names, and the others."""
        inside, rest = {}, {}
        for name, tensor in tensors.items():
            own = self.names.own(name)
            if own is None:
                rest[name] = tensor
            else:
                inside[own] = tensor
        return inside, rest

    def keeps_narrow_bits(self, family: Family) -> bool:
        """Ask the target inside."""
        return self.inner.keeps_narrow_bits(family)

    def norm_identity(self, family: Family) -> float:
        """Ask the target inside."""
        return self.inner.norm_identity(family)

    def routing(self, router: Router) -> Router:
        """Return the router of the target inside."""
        return self.inner.routing(router)

    def divides_exactly(self, site: Site, router: Router) -> bool:
        """Ask the target inside."""
        return self.inner.divides_exactly(site, router)

    def draws(self, name: str) -> bool:
        """Ask the target inside."""
        return self.inner.draws(name)

    def kernel(self, lengths: Iterable[int], itemsize: int) -> Config:
        """Ask the target inside; transformers passes the setting on to the models within a model."""
        return self.inner.kernel(lengths, itemsize)

    def warnings(self, built: Blueprint) -> list[str]:
        """Ask the target inside."""
        return self.inner.warnings(built)

    def origin(self, recipe: Recipe) -> str:
        """Ask the target inside."""
        return self.inner.origin(recipe)

    @classmethod
    def label(cls, recipe: Mapping[str, Any]) -> str:
        """Ask the target that the recipe names."""
        return targets.recorded(recipe["moe"]).label(recipe)

    def snippet(self, config: Mapping[str, Any]) -> str:
        """Return Python code that opens the folder."""
        return self.inner.snippet(config)


@dataclass(frozen=True, kw_only=True)
class Headless(Renamed):
    """The base model of a target."""

    @classmethod
    def of(cls, inner: Target) -> Self:
        """Return the base model of `inner`."""
        return cls(
            inner=inner,
            names=Names(),
            model_type=inner.model_type,
            architecture=inner.base_architecture,
        )

    def tokenizer(self, family: Family) -> str:
        """Return the rule of the target inside, whose type the folder has."""
        return self.inner.tokenizer(family)

    def snippet(self, config: Mapping[str, Any]) -> str:
        """Return Python code that opens the folder."""
        return self.inner.snippet(config).replace("AutoModelForCausalLM", "AutoModel")
