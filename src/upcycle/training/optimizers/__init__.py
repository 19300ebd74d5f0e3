"""What updates the weights. One file here is one optimizer: its keys, and how torch makes it.

A file `NAME.py` defines a frozen dataclass deriving from `Optimizer`, bound to the module name `optimizer`;
its fields are the keys of `[optimizer] name = "NAME"`. torch is imported in the methods that need it: a run
file is read without it.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from upcycle import settings
from upcycle.errors import UpcycleError
from upcycle.settings import AtLeast, Named, keys

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ONCE_OF_TRAIN = ("weight_decay", "beta1", "beta2", "eps")  # keys that run files have in [train]


@dataclass(frozen=True, kw_only=True)
class Optimizer(Named, abc.ABC):
    """How weights are updated, and what a run may do with the optimizer's state."""

    section: ClassVar[str] = "optimizer"
    package: ClassVar[str] = __name__
    usual: ClassVar[str | None] = "adamw"
    common: ClassVar[tuple[str, ...]] = ("carry_state", "weight_decay")

    summary: ClassVar[str]

    # moments that `upcycle export --optimizer` left in the source, tiled to experts
    carry_state: bool = False
    weight_decay: Annotated[float, AtLeast(0)] = 0.1  # of matrices; see `optimizer.decays`

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
        """Why a parameter of `shape` cannot be updated if ranks share its `dims`; None if it can."""
        return None


def usual() -> Optimizer:
    """The optimizer of a run that names none."""
    return settings.read(Optimizer, {}, "optimizer")


def today(run: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a run file with the optimizer's keys in [optimizer]; files may have four in [train].

    Raises `UpcycleError` if both have one, or if the optimizer has no such key.
    """
    train, own = run.get("train"), run.get("optimizer", {})
    if not isinstance(train, Mapping) or not isinstance(own, Mapping):
        return dict(run)
    moved = {key: train[key] for key in _ONCE_OF_TRAIN if key in train}
    if not moved:
        return dict(run)
    chosen = Optimizer.chosen(own.get("name"))
    for key, value in moved.items():
        if key not in keys(chosen):
            raise UpcycleError(
                f"train.{key} is for optimizer.name = {Optimizer.usual}, and it is {own['name']}; take it out"
            )
        if key in own and own[key] != value:
            raise UpcycleError(f"train.{key} = {value} and optimizer.{key} = {own[key]}; give one of them")
    rest = {key: value for key, value in train.items() if key not in moved}
    return {**run, "train": rest, "optimizer": {**moved, **own}}


def as_recorded(run: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The table of a run with its optimizer where records have always had it: AdamW's keys in [train]."""
    table = optimizer.as_table()
    if optimizer.name != Optimizer.usual:
        return {**run, "optimizer": table}
    of_train = {key: table.pop(key) for key in _ONCE_OF_TRAIN}
    del table["name"]
    return {**run, "train": {**run["train"], **of_train}, "optimizer": table}


def find(name: str) -> type[Optimizer]:
    """The optimizer called `name`."""
    return Optimizer.find(name)


def names() -> list[str]:
    """The names of all optimizers."""
    return Optimizer.names()
