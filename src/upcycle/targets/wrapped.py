"""A target under other names: within a multimodal model, or without a head.

No recipe names it: the source decides. The text model becomes what the recipe says, by the rules of that
target, and this file says how it is spelled on disk and what else the folder holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from upcycle import families, targets
from upcycle.checkpoints.dtypes import COUNTERS
from upcycle.errors import UpcycleError
from upcycle.families import Config, Family, Weights
from upcycle.families._names import Names
from upcycle.families._training import Trained
from upcycle.families._weights import Initial, Weight
from upcycle.families._wrappers import HEAD_APART, TEXT, VISION, Wrapper, config_key
from upcycle.init import Site
from upcycle.nn.routers import Router
from upcycle.nn.upcycled_config import PREFIX, dense_type
from upcycle.targets import Block, Target, _moe_layer
from upcycle.tensors.entries import Entry
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.blueprints.blueprint import Blueprint
    from upcycle.dense.source import Dense
    from upcycle.recipe import Recipe
    from upcycle.targets._layouts import MoeNames

_BLOCKS = "layers."
_EXPERTS = ".experts."


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
class HeadlessTarget(Renamed):
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


@dataclass(frozen=True, kw_only=True)
class Around(Renamed):
    """A multimodal model around a target, which is one of its parts."""

    part: ClassVar[str]
    is_around: ClassVar[bool] = True

    @property
    def gathers_head(self) -> bool:  # type: ignore[override]
        return self.architecture in HEAD_APART

    @property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]
        """The part that is a target."""
        return (self.part,)

    def config(self, dense: Dense, recipe: Recipe, sites: tuple[Site, ...]) -> Config:
        """Return config.json of the multimodal model, with the config of the target inside."""
        return {
            **dense.checkpoint.config,
            "architectures": [self.architecture],
            "model_type": self.model_type,
            config_key(self.part): self.inner.config(dense, recipe, sites),
        }

    def tensors(self, models: list[Dense], recipe: Recipe, sites: tuple[Site, ...]) -> dict[str, Lazy]:
        """Return the tensors of the target inside by their names on disk, and all that is around it."""
        mixed = _moe_layer.in_backbone(models, recipe)
        around = {
            name: tensor if tensor.dtype in COUNTERS else recipe.init.merge([m.around[name] for m in mixed])
            for name, tensor in models[0].around.items()
        }
        return super().tensors(models, recipe, sites) | around

    def own_config(self, config: Mapping[str, Any]) -> Config:
        """Return the config of the target inside."""
        return self.inner.own_config(config[config_key(self.part)])

    def with_own(self, config: Config, changes: Mapping[str, Any]) -> Config:
        """Return config.json with other keys in the part of the target inside."""
        key = config_key(self.part)
        return {**config, key: self.inner.with_own(config[key], changes)}

    @classmethod
    def found(cls, config: Mapping[str, Any]) -> Self | None:
        """Return the multimodal model whose part is a target; `layers` finds its names."""
        within = config.get(config_key(cls.part))
        inner = targets.opened(within) if isinstance(within, Mapping) else None
        if inner is None:
            return None
        named = config.get("architectures")
        return cls(
            inner=inner,
            names=Names(root=inner.root),
            model_type=str(config.get("model_type")),
            architecture=str(named[0]) if isinstance(named, list) and named else "",
        )

    def snippet(self, config: Mapping[str, Any]) -> str:
        """Return Python code that opens the folder; upcycle opens it if it made the class of any part."""
        parts = (config.get(config_key(part)) for part in (TEXT, VISION))
        if any(isinstance(part, Mapping) and dense_type(part) is not None for part in parts):
            imports, opening = "import upcycle\nfrom transformers import AutoProcessor", "upcycle.open"
        else:
            imports = f"from transformers import {self.architecture}, AutoProcessor"
            opening = f"{self.architecture}.from_pretrained"
        return (
            f"{imports}\n\n"
            f'model = {opening}("path/to/this/folder")\n'
            'processor = AutoProcessor.from_pretrained("path/to/this/folder")\n'
        )


@dataclass(frozen=True, kw_only=True)
class Seeing(Around):
    """A multimodal model whose vision tower is a target."""

    part: ClassVar[str] = VISION
    beside: Wrapped | None = None  # its text model, if that had experts before

    @classmethod
    def of(cls, inner: Target, names: Names, model_type: str, wrapper: Wrapper) -> Self:
        """Return the multimodal model around `inner`, whose class is the same."""
        return cls(inner=inner, names=names, model_type=model_type, architecture=wrapper.architecture)

    def in_memory(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return the tensors as the class holds them, with those of experts in the text model."""
        made = super().in_memory(entries)
        return made if self.beside is None else self._text(made).in_memory(made)

    def on_disk(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return the tensors by their names on disk, given as `in_memory` returns them."""
        made = super().on_disk(entries)
        return made if self.beside is None else self._text(made).on_disk(made)

    def _text(self, entries: Mapping[str, Entry]) -> Wrapped:
        assert self.beside is not None
        return self.beside.at(self._parts(entries)[1], f"the text model of {self.model_type}")

    def start(self, config: Mapping[str, Any], tensors: Iterable[str]) -> str | None:
        """Return what the names of the tower begin with in a folder, or None if it has no experts there."""
        own = self.own_config(config)
        family = families.find(str(own.get("model_type")).removeprefix(PREFIX))
        stacks = family.stacks(family.config(self.inner.dense_config(own) or own))
        ends = [stack.path.partition("{i}")[0] for stack in stacks]
        experts = (name.partition(_EXPERTS)[0] for name in tensors if _EXPERTS in name)
        found = (re.match(rf"(.*?)({'|'.join(map(re.escape, ends))})\d+\.", name) for name in experts)
        return next((at[1] for at in found if at), None)

    def layers(self, config: Mapping[str, Any], tensors: Mapping[str, Lazy], folder: Path) -> list[Block]:
        """Return the blocks of the vision tower."""
        start = self.start(config, tensors)
        if start is None:
            raise UpcycleError(f"{folder} has no tensors of experts in its vision tower")
        at = replace(self, names=Names(root=self.inner.root, body=start, head=start))
        return [replace(block, part=VISION) for block in super(Seeing, at).layers(config, tensors, folder)]


@dataclass(frozen=True, kw_only=True)
class Wrapped(Around):
    """A multimodal model around a text model that is a target."""

    part: ClassVar[str] = TEXT
    beside: Seeing | None = None  # its vision tower, if that has experts too

    @property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]
        """The text model, and the vision tower if it has experts."""
        return (TEXT, VISION) if self.beside else (TEXT,)

    @classmethod
    def of(cls, inner: Target, names: Names, model_type: str, wrapper: Wrapper) -> Self:
        """Return the wrapper around `inner`. Raises `UpcycleError` if it cannot hold it."""
        own, architecture = inner.within(model_type, wrapper)
        return cls(inner=inner, names=names, model_type=own, architecture=architecture)

    def config(self, dense: Dense, recipe: Recipe, sites: tuple[Site, ...]) -> Config:
        """Return config.json of the wrapper, in which both configs say whether the head is tied."""
        config, key = super().config(dense, recipe, sites), "tie_word_embeddings"
        own = config[config_key(TEXT)] | {key: dense.config[key]}
        return config | {key: dense.config[key], config_key(TEXT): own}

    @classmethod
    def opened(cls, config: Mapping[str, Any]) -> Target | None:  # type: ignore[override]
        """Return the multimodal model whose text model or vision tower is a target, or both."""
        text, vision = cls.found(config), Seeing.found(config)
        return vision if text is None else replace(text, beside=vision)

    def layers(self, config: Mapping[str, Any], tensors: Mapping[str, Lazy], folder: Path) -> list[Block]:
        """Return the blocks of the text model, and those of the vision tower if it has experts."""
        tower = self.beside.start(config, tensors) if self.beside else None
        others = (name for name in tensors if tower is None or not name.startswith(tower))
        found = self.at(others, folder)
        more = self.beside.layers(config, tensors, folder) if self.beside else []
        return [*super(Wrapped, found).layers(config, tensors, folder), *more]

    def at(self, names: Iterable[str], where: object) -> Self:
        """Return the same around the text model whose experts are among the `names` of tensors."""
        experts = (name for name in names if _EXPERTS in name and not name.startswith("mtp."))
        start = next((name.partition(_BLOCKS)[0] for name in experts), None)
        if start is None:
            raise UpcycleError(f"{where} has no tensors of experts")
        return replace(self, names=Names(root=self.inner.root, body=start, head=start))

    def refuse_layout(self, config: Mapping[str, Any], *, tp_size: int, ep_size: int) -> None:
        """Ask the targets inside."""
        super().refuse_layout(config, tp_size=tp_size, ep_size=ep_size)
        if self.beside:
            self.beside.refuse_layout(config, tp_size=tp_size, ep_size=ep_size)


target = Wrapped


def of(dense: Dense, recipe: Recipe) -> Target:
    """Refuse a recipe that names this file, because the source decides whether something is around it."""
    raise UpcycleError(
        "moe.target = wrapped: whether there is a model around the text model is up to the source; give "
        "native, upcycled, or the name of a native target"
    )
