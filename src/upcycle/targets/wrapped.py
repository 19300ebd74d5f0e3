"""A target within a multimodal model, as its text model or its vision tower.

No recipe names it: the source decides. The part becomes what the recipe says, by the rules of that
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
from upcycle.families import Config
from upcycle.families._names import Names
from upcycle.families._wrappers import HEAD_APART, TEXT, VISION, Wrapper, config_key
from upcycle.init import Site
from upcycle.nn.upcycled_config import PREFIX, dense_type
from upcycle.targets import Block, Target, _moe_layer
from upcycle.targets._renamed import Renamed
from upcycle.tensors.entries import Entry
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.dense.source import Dense
    from upcycle.recipe import Recipe

_BLOCKS = "layers."
_EXPERTS = ".experts."


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
