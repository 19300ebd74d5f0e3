"""What a dense model becomes. One file here is one kind of target, and its name is what `moe.target` says.

A file `NAME.py` binds a function `of(dense, recipe)` that returns a `Target`, and `target`, its class.
Everything else (blueprint, load, plan, card, export, inspect, report) asks the target, and never which one it
is: `of` finds the target of a recipe, `opened` that of a folder, `recorded` the kind of a recipe on record.
`natives/` has one file for each MoE architecture of transformers; `native.py` finds the one that `moe.target`
names.
"""

from __future__ import annotations

import abc
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from upcycle import registry
from upcycle.blueprints.entries import Entry
from upcycle.errors import UpcycleError
from upcycle.families import Config, Family, Weights
from upcycle.families._weights import Initial, Weight
from upcycle.init import Site
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.blueprints.blueprint import Blueprint
    from upcycle.dense.source import Dense
    from upcycle.families._training import Trained
    from upcycle.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a model that was made: its experts, the universal ones beside them, and its router [E, H];
    or the network that stayed dense."""

    stack: str
    layer: int
    experts: list[FeedForward]
    router: Lazy | None
    up: Lazy  # [I, H], of the first expert or of the dense network
    universal: Sequence[FeedForward] = ()


class Target(abc.ABC):
    """What a dense model becomes: its class, its config, its tensors, and how to open it."""

    model_type: str  # of config.json
    architecture: str  # the class that opens it
    summary: str  # for `upcycle list`
    needs: ClassVar[str] = "nothing"
    kind: ClassVar[str]  # what was made, at the head of a column: MoE, deeper or narrower
    has_experts: ClassVar[bool]

    @classmethod
    def listed(cls) -> list[dict[str, str]]:
        """Its rows in `upcycle list`: name, summary and needs of every target of this kind."""
        return [{"name": cls.__module__.rpartition(".")[2], "summary": cls.summary, "needs": cls.needs}]

    @classmethod
    def opened(cls, config: Mapping[str, Any]) -> Self | None:
        """The target whose folder has this config.json; None if it is no such folder."""
        return None

    @classmethod
    def dense_class(cls, architecture: str) -> str:
        """The name of the dense class in that of a class of this kind; any other name as it is."""
        return architecture

    @abc.abstractmethod
    def admit(self, dense: Dense, recipe: Recipe) -> None:
        """Raise `UpcycleError` if this target cannot keep what the source or the recipe asks for."""

    @abc.abstractmethod
    def sites(self, dense: Dense, recipe: Recipe) -> tuple[Site, ...]:
        """The blocks that become MoE layers, stack by stack."""

    @abc.abstractmethod
    def config(self, dense: Dense, recipe: Recipe, sites: tuple[Site, ...]) -> Config:
        """config.json of the result, but for its dtype."""

    @abc.abstractmethod
    def tensors(self, models: list[Dense], recipe: Recipe, sites: tuple[Site, ...]) -> dict[str, Lazy]:
        """Every tensor of the result by its name on disk. `models` are the dense models, the source first."""

    @abc.abstractmethod
    def weights(self, dense: Dense, config: Config, entries: Mapping[str, Entry]) -> Weights:
        """What every tensor of `entries` is; `config` is config.json of the result."""

    def begins(
        self, family: Trained, dense: Dense, name: str, weight: Weight, entry: Entry
    ) -> Initial | None:
        """What the tensor called `name` starts training from nothing as; None: nobody has said it."""
        return family.initial(dense.config, name, weight)

    def layers(self, config: Mapping[str, Any], tensors: Mapping[str, Lazy], folder: Path) -> list[Block]:
        """The blocks of a folder of this target, in order. `tensors` are those of the folder by name.

        Raises `UpcycleError` if config or names are not such a folder's, `KeyError` for a tensor that is
        missing.
        """
        return []

    def dense_config(self, config: Mapping[str, Any]) -> Config | None:
        """The config of the dense class in that of a folder; None: the class is another one."""
        return None

    def refuse_layout(  # noqa: B027 - most layouts fit
        self, config: Mapping[str, Any], *, tp_size: int, ep_size: int
    ) -> None:
        """Raise `UpcycleError` if a model of this config cannot be shared out over so many processes."""

    @classmethod
    def moments(cls, recipe: Recipe) -> Recipe:
        """The recipe that makes the optimizer's moments of the result out of the dense model's."""
        return type(recipe).of(recipe.as_table() | {"init": {"name": "copy"}, "dtype": "source"})

    def in_memory(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """The tensors under the names and in the shapes that the class holds them in."""
        return dict(entries)

    def keeps_narrow_bits(self, family: Family) -> bool:
        """Whether the tensors that are no experts keep their bits in bfloat16 and float16."""
        return True

    def norm_identity(self, family: Family) -> float:
        """The weight of a norm that only normalises."""
        return family.norm_identity

    def draws(self, name: str) -> bool:
        """Whether the recipe gives the tensor called `name`, and not the dense class, its first values."""
        return False

    def kernel(self, lengths: Iterable[int], itemsize: int) -> Config:
        """What config.json must say for experts to run that have rows of these lengths, of `itemsize` bytes a
        number."""
        return {}

    def warnings(self, built: Blueprint) -> list[str]:
        """What a person should know about this target, one sentence each."""
        return []

    @abc.abstractmethod
    def origin(self, recipe: Recipe) -> str:
        """How the weights were made, in a few words."""

    @classmethod
    @abc.abstractmethod
    def label(cls, recipe: Mapping[str, Any]) -> str:
        """How a model of a recorded recipe was made, in a few words, beside other models."""

    @classmethod
    def made_by(cls, recipe: Mapping[str, Any]) -> str:
        """The end of a sentence that says how a model of a recorded recipe was made."""
        return f" by init {recipe['init']['name']}"

    @abc.abstractmethod
    def snippet(self) -> str:
        """Python code that opens the folder."""


def of(dense: Dense, recipe: Recipe) -> Target:
    """The target that the recipe names, if it can keep what source and recipe ask for.

    Raises `UpcycleError` with what is allowed.
    """
    package, name = sys.modules[__name__], recipe.moe.target
    target: Target = registry.find(package, name if name in names() else "native", "of", "target")(
        dense, recipe
    )
    target.admit(dense, recipe)
    return target


def names() -> list[str]:
    """The kinds of target that have a file here."""
    return [name for name in registry.names(sys.modules[__name__]) if name != "natives"]


def kind(name: str) -> type[Target]:
    """The class of the targets of one kind."""
    found: type[Target] = registry.find(sys.modules[__name__], name, "target", "target")
    return found


def catalogue() -> list[dict[str, str]]:
    """Every target by name, summary and needs, those that other libraries know first."""
    first = sorted(names(), key=lambda name: name != "native")
    return [row for name in first for row in kind(name).listed()]


def opened(config: Mapping[str, Any]) -> Target | None:
    """The target whose folder has this config.json; None if it is that of a dense model."""
    found = (kind(name).opened(config) for name in names())
    return next((target for target in found if target is not None), None)


def dense_class(architecture: str) -> str:
    """The name of the dense class of transformers in that of a class of any target, and its own otherwise."""
    for name in names():
        architecture = kind(name).dense_class(architecture)
    return architecture


def recorded(moe: Mapping[str, Any]) -> type[Target]:
    """The kind of target of a recorded recipe; `moe` is its table of that name."""
    name = moe.get("target")
    return kind(name if name in names() else "native")


def refuse_experts(recipe: Recipe, sections: tuple[str, ...]) -> None:
    """Raise `UpcycleError` if a recipe for a dense target asks for experts: nothing would heed it."""
    given, default, target = recipe.as_table(), type(recipe).of().as_table(), recipe.moe.target
    if recipe.parts:
        raise UpcycleError(
            f"moe.target = {target} makes no experts, and [{next(iter(recipe.parts))}] is about them; take "
            f"it out"
        )
    for section in sections:
        for key, value in given[section].items():
            if value != default[section].get(key) and key not in ("target", "depth"):
                raise UpcycleError(
                    f"moe.target = {target} makes no experts, and {section}.{key} = {value} is about them; "
                    f"take it out"
                )


def dense_snippet(architecture: str) -> str:
    """Python code that opens a folder of a dense class of transformers."""
    return (
        f"from transformers import {architecture}\n\n"
        f'model = {architecture}.from_pretrained("path/to/this/folder")\n'
    )
