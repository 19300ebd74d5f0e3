"""The targets: what a dense model can become. Each file here is one kind, named as in `moe.target`.

A file `NAME.py` binds a function `of(dense, recipe)` that returns a `Target`, and `target`, its class.
Everything else (blueprint, load, plan, card, export, inspect, report) asks the target and never checks which
one it is. `of` finds the target of a recipe, `opened` that of a folder, `recorded` the kind of a recorded
recipe. `natives/` has one file for each MoE architecture of transformers; `native.py` finds the one that
`moe.target` names.
"""

from __future__ import annotations

import abc
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from upcycle import registry
from upcycle.errors import UpcycleError
from upcycle.families import Config, Family, Weights
from upcycle.families._weights import Initial, Weight
from upcycle.families._wrappers import TEXT, VISION, Wrapper
from upcycle.init import Site
from upcycle.nn.routers import Router
from upcycle.tensors.entries import Entry
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.blueprints.blueprint import Blueprint
    from upcycle.dense.source import Dense
    from upcycle.families._training import Trained
    from upcycle.recipe import Recipe
    from upcycle.targets._layouts import MoeNames


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a finished model.

    It holds its experts, the universal ones beside them, and its router [E, H], or the network that stayed
    dense.
    """

    stack: str
    layer: int
    experts: list[FeedForward]
    router: Lazy | None
    up: Lazy  # [I, H], of the first expert or of the dense network
    universal: Sequence[FeedForward] = ()
    part: str = TEXT  # the part of a multimodal model that it stands in

    @property
    def place(self) -> str:
        """The name of its stack for a reader of the whole model."""
        return VISION if self.part == VISION else self.stack


class Target(abc.ABC):
    """A model that a dense model can become: its class, its config, its tensors, and how to open it."""

    model_type: str  # the one in config.json
    architecture: str  # the class that opens it
    summary: str  # shown by `upcycle list`
    needs: ClassVar[str] = "nothing"
    kind: ClassVar[str]  # what is made, used as a column heading: MoE, deeper or narrower
    has_experts: ClassVar[bool]
    # whether FSDP gathers the embedding apart from the rest, and the last norm with the head
    gathers_ends: ClassVar[bool] = True
    # whether it gathers a head that is not tied apart from the whole model
    gathers_head: ClassVar[bool] = True
    # whether its routers are those of `nn/routers`; else those of a class of transformers
    has_own_routers: ClassVar[bool] = False
    # by `train.precision`: parts of the names of a router's tensors, if it is in float32 and its block is not
    wide_router: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    is_around: ClassVar[bool] = False  # whether it is a multimodal model around another target
    parts: tuple[str, ...] = (TEXT,)  # of a multimodal model, those with experts
    root = "model."  # what the names of the base model's tensors begin with, in a model with a head

    @property
    def base_architecture(self) -> str:
        """The class without a head."""
        return self.architecture.replace("ForCausalLM", "Model")

    @property
    def computes(self) -> str:
        """The model_type of what has the experts, which may be the text model within a wrapper."""
        return self.model_type

    def within(self, model_type: str, wrapper: Wrapper) -> tuple[str, str]:
        """Return model_type and class of a wrapper of that type that holds this model.

        Raises `UpcycleError` if transformers has none.
        """
        return model_type, wrapper.architecture

    @classmethod
    def listed(cls) -> list[dict[str, str]]:
        """Return the rows of this kind in `upcycle list`: name, summary and needs of each target."""
        return [{"name": cls.__module__.rpartition(".")[2], "summary": cls.summary, "needs": cls.needs}]

    @classmethod
    def opened(cls, config: Mapping[str, Any]) -> Self | None:
        """Return the target of a folder with this config.json, or None if it is not one of this kind."""
        return None

    @classmethod
    def dense_class(cls, architecture: str) -> str:
        """Return the name of the dense class within that of a class of this kind, or the name itself."""
        return architecture

    @abc.abstractmethod
    def admit(self, dense: Dense, recipe: Recipe) -> None:
        """Raise `UpcycleError` if this target cannot keep what the source or the recipe asks for."""

    @abc.abstractmethod
    def sites(self, dense: Dense, recipe: Recipe) -> tuple[Site, ...]:
        """Return the blocks that become MoE layers, stack by stack."""

    @abc.abstractmethod
    def config(self, dense: Dense, recipe: Recipe, sites: tuple[Site, ...]) -> Config:
        """Return config.json of the result, without its dtype."""

    @abc.abstractmethod
    def tensors(self, models: list[Dense], recipe: Recipe, sites: tuple[Site, ...]) -> dict[str, Lazy]:
        """Return every tensor of the result by its name on disk. `models` has the source first."""

    @abc.abstractmethod
    def weights(self, dense: Dense, config: Config, entries: Mapping[str, Entry]) -> Weights:
        """Return the kind of every tensor in `entries`; `config` is config.json of the result."""

    def begins(
        self, family: Trained, dense: Dense, name: str, weight: Weight, entry: Entry
    ) -> Initial | None:
        """Return how the tensor `name` starts when training from scratch; None if that is unknown."""
        return family.initial(dense.config, name, weight)

    def layers(self, config: Mapping[str, Any], tensors: Mapping[str, Lazy], folder: Path) -> list[Block]:
        """Return the blocks of a folder of this target, in order. `tensors` are those of the folder by name.

        Raises `UpcycleError` if the config or the names do not fit this target, and `KeyError` if a tensor is
        missing.
        """
        return []

    def own_config(self, config: Mapping[str, Any]) -> Config:
        """Return the part of config.json that is about the model whose blocks these are."""
        return dict(config)

    def layer_names(self) -> MoeNames | None:
        """Return the names of a layer with experts that other programs know as well, or None."""
        return None

    def with_own(self, config: Config, changes: Mapping[str, Any]) -> Config:
        """Return config.json with other keys of the model whose blocks these are."""
        return {**config, **changes}

    def dense_config(self, config: Mapping[str, Any]) -> Config | None:
        """Return the config of the dense class within that of a folder, or None if there is none."""
        return None

    def refuse_layout(  # noqa: B027 - most layouts fit
        self, config: Mapping[str, Any], *, tp_size: int, ep_size: int
    ) -> None:
        """Raise `UpcycleError` if a model of this config cannot be distributed over so many processes."""

    @classmethod
    def moments(cls, recipe: Recipe) -> Recipe:
        """Return the recipe that makes the result's optimizer moments out of the dense model's."""
        return type(recipe).of(recipe.as_table() | {"init": {"name": "copy"}, "dtype": "source"})

    def own(self, name: str) -> str | None:
        """Return the model's own name of the tensor of that name on disk; None if it is of another part."""
        return name

    def owns(self, name: str) -> bool:
        """Return whether the tensor of that name on disk belongs to the model itself."""
        return self.own(name) is not None

    def in_memory(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return the tensors under the names and in the shapes in which the class holds them in memory."""
        return dict(entries)

    def on_disk(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return the tensors under their names and in their shapes on disk; the inverse of `in_memory`."""
        return dict(entries)

    def keeps_narrow_bits(self, family: Family) -> bool:
        """Return whether the tensors outside the experts keep their bits in bfloat16 and float16."""
        return True

    def tokenizer(self, family: Family) -> str:
        """Return the rule by which transformers opens the tokenizer; see `Family.tokenizer`."""
        return family.tokenizer

    def norm_identity(self, family: Family) -> float:
        """Return the weight of a norm that only normalises."""
        return family.norm_identity

    def routing(self, router: Router) -> Router:
        """Return the router that the result computes, for the one in the recipe."""
        return router

    def divides_exactly(self, site: Site, router: Router) -> bool:
        """Return whether the class divides scores by nothing but their sum, as far as that shows."""
        return True

    def draws(self, name: str) -> bool:
        """Return whether the recipe, not the dense class, gives the tensor `name` its initial values."""
        return False

    def kernel(self, lengths: Iterable[int], itemsize: int) -> Config:
        """Return the config.json keys needed to run experts with these row lengths.

        `itemsize` is the number of bytes per element.
        """
        return {}

    def warnings(self, built: Blueprint) -> list[str]:
        """Return what a user should know about this target, one sentence for each point."""
        return []

    @abc.abstractmethod
    def origin(self, recipe: Recipe) -> str:
        """Return how the weights were made, in a few words."""

    @classmethod
    @abc.abstractmethod
    def label(cls, recipe: Mapping[str, Any]) -> str:
        """Return a short label for how a model of a recorded recipe was made, beside other models."""

    @classmethod
    def way(cls, recipe: Mapping[str, Any]) -> str:
        """Return the name of the way in which a model of a recorded recipe was made of its source."""
        return str((recipe.get("init") or {}).get("name", "copy"))

    @classmethod
    def made_by(cls, recipe: Mapping[str, Any]) -> str:
        """Return the end of a sentence that says how a model of a recorded recipe was made."""
        return f" by init {recipe['init']['name']}"

    @abc.abstractmethod
    def snippet(self, config: Mapping[str, Any]) -> str:
        """Return Python code that opens the folder. `config` is its config.json."""


def of(dense: Dense, recipe: Recipe) -> Target:
    """Return the target that the recipe names.

    Raises `UpcycleError`, which says what is allowed, if it cannot keep what source and recipe ask for.
    """
    package, name = sys.modules[__name__], recipe.moe.target
    target: Target = registry.find(package, name if name in names() else "native", "of", "target")(
        dense, recipe
    )
    target.admit(dense, recipe)
    return dense.place.around(target)


def names() -> list[str]:
    """Return the kinds of target that have a file here."""
    return [name for name in registry.names(sys.modules[__name__]) if name != "natives"]


def kind(name: str) -> type[Target]:
    """Return the class of the targets of one kind."""
    found: type[Target] = registry.find(sys.modules[__name__], name, "target", "target")
    return found


def catalogue() -> list[dict[str, str]]:
    """Return name, summary and needs of every target, those that other libraries know first."""
    first = sorted(names(), key=lambda name: name != "native")
    return [row for name in first for row in kind(name).listed()]


def opened(config: Mapping[str, Any]) -> Target | None:
    """Return the target of a folder with this config.json, or None if it is a dense model's."""
    found = (kind(name).opened(config) for name in names())
    return next((target for target in found if target is not None), None)


def dense_class(architecture: str) -> str:
    """Return the dense transformers class within the name of a class of any target, or the name itself."""
    for name in names():
        architecture = kind(name).dense_class(architecture)
    return architecture


def recorded(moe: Mapping[str, Any]) -> type[Target]:
    """Return the kind of target of a recorded recipe; `moe` is its table of that name."""
    name = moe.get("target")
    return kind(name if name in names() else "native")


def refuse_experts(recipe: Recipe, sections: tuple[str, ...]) -> None:
    """Raise `UpcycleError` if a recipe for a dense target asks for experts, which it would ignore."""
    given, default, target = recipe.as_table(), type(recipe).of().as_table(), recipe.moe.target
    if recipe.parts:
        raise UpcycleError(
            f"moe.target = {target} makes no experts, and [{next(iter(recipe.parts))}] is about them; take "
            f"it out"
        )
    for section in sections:
        for key, value in given[section].items():
            if value != default[section].get(key) and key not in ("target", "depth", "part_only"):
                raise UpcycleError(
                    f"moe.target = {target} makes no experts, and {section}.{key} = {value} is about them; "
                    f"take it out"
                )


def dense_snippet(architecture: str) -> str:
    """Return Python code that opens a folder of a dense class of transformers."""
    return (
        f"from transformers import {architecture}\n\n"
        f'model = {architecture}.from_pretrained("path/to/this/folder")\n'
    )
