"""What updates the weights. One file here is one optimizer: its keys, and how torch makes it.

A file `NAME.py` defines a frozen dataclass deriving from `Optimizer`, bound to the module name `optimizer`;
its fields are the keys of `[optimizer] name = "NAME"`. torch is imported in the methods that need it: a run
file is read without it.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from upcycle import recipe, registry
from upcycle.errors import UpcycleError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEFAULT = "adamw"
_ONCE_OF_TRAIN = ("weight_decay", "beta1", "beta2", "eps")  # keys that run files have in [train]


@dataclass(frozen=True, kw_only=True)
class Optimizer(abc.ABC):
    """How weights are updated, and what a run may do with the optimizer's state."""

    summary: ClassVar[str]

    carry_state: bool = (
        False  # moments that `upcycle export --optimizer` left in the source, tiled to experts
    )
    weight_decay: float = 0.1  # of matrices; see `optimizer.decays`

    def __post_init__(self) -> None:
        at_least_zero("weight_decay", self.weight_decay)

    @property
    def name(self) -> str:
        """The name in the run file: that of the file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def moments(self) -> tuple[str, ...]:
        """The parts of the state that have the shape of their parameter and belong to its elements.

        An export writes them, and a later run takes them for weights that are copies.
        """
        return ()

    @abc.abstractmethod
    def make(self, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        """torch's optimizer over `groups`, which have `params` and a `weight_decay` each.

        Its rate is set before every step; here it is 0.
        """

    def state(self, parameter: Tensor, step: int, moments: Mapping[str, Tensor]) -> dict[str, Any]:
        """The state of `parameter` after `step` updates with these moments, as torch's optimizer keeps it."""
        return dict(moments)

    def idle(self, parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter that no gradient has reached yet."""
        import torch

        return self.state(parameter, 0, {name: torch.zeros_like(parameter) for name in self.moments})

    def cannot_shard(self, shape: Sequence[int], dims: Sequence[int]) -> str | None:
        """Why a parameter of `shape` cannot be updated where ranks share its dimensions `dims`; None if it
        can."""
        return None


def at_least_zero(name: str, value: float) -> None:
    """Raise `UpcycleError` unless the key `name` is finite, and 0 or more."""
    if not 0 <= value < math.inf:
        raise UpcycleError(f"optimizer.{name} = {value}; it must be a number of 0 or more")


def below_one(name: str, value: float) -> None:
    """Raise `UpcycleError` unless the key `name` is in [0, 1)."""
    if not 0 <= value < 1:
        raise UpcycleError(f"optimizer.{name} = {value}; it must be in [0, 1)")


def read(table: Mapping[str, Any]) -> Optimizer:
    """The optimizer of a table with `name` and its keys.

    Raises `UpcycleError` for an unknown name or key.
    """
    options = dict(table)
    name = options.pop("name", DEFAULT)
    made: Optimizer = recipe.read(find(name), options, "optimizer")
    return made


def gathered(run: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a run file with the optimizer's keys in [optimizer]; files may have four in [train].

    Raises `UpcycleError` if both have one, or if the optimizer has no such key.
    """
    train, own = run.get("train"), run.get("optimizer", {})
    if not isinstance(train, dict) or not isinstance(own, dict):
        return dict(run)
    moved = {key: train[key] for key in _ONCE_OF_TRAIN if key in train}
    name = own.get("name", DEFAULT)
    known = keys(name) if moved else ()
    for key, value in moved.items():
        if key in own and own[key] != value:
            raise UpcycleError(f"train.{key} = {value} and optimizer.{key} = {own[key]}; give one of them")
        if key not in known:
            raise UpcycleError(
                f"train.{key} is for optimizer.name = {DEFAULT}, and it is {name}; take it out"
            )
    rest = {key: value for key, value in train.items() if key not in moved}
    return {**run, "train": rest, "optimizer": {**moved, **own}}


def spread(run: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The table of a run with its optimizer where records have always had it: AdamW's keys in [train]."""
    table = {"name": optimizer.name, **dataclasses.asdict(optimizer)}
    if optimizer.name != DEFAULT:
        return {**run, "optimizer": table}
    of_train = {key: table.pop(key) for key in _ONCE_OF_TRAIN}
    del table["name"]
    return {**run, "train": {**run["train"], **of_train}, "optimizer": table}


def keys(name: str) -> tuple[str, ...]:
    """The keys of the optimizer called `name`."""
    return tuple(field.name for field in dataclasses.fields(find(name)))


def find(name: str) -> type[Optimizer]:
    """The optimizer called `name`."""
    return registry.find(sys.modules[__name__], name, "optimizer", "optimizer.name")


def names() -> list[str]:
    """The names of all optimizers."""
    return registry.names(sys.modules[__name__])
