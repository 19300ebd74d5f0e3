"""Optimizers. Each file here is one: its keys, and how torch builds it.

A file `NAME.py` defines a frozen dataclass derived from `Optimizer` and binds it to the module name
`optimizer`; its fields are the keys of `[optimizer] name = "NAME"`. torch is imported in the methods that
need it, because run files are read without it.
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

    from upcycle.training.roles import Kind, Role

# the key of the factor on the rate of each kind of parameter
_RATES: dict[Kind, str] = {"router": "router_rate", "experts": "expert_rate", "rest": "rest_rate"}
_ONCE_OF_TRAIN = ("weight_decay", "beta1", "beta2", "eps")  # keys that run files may have in [train]


@dataclass(frozen=True, kw_only=True)
class Optimizer(Named, abc.ABC):
    """The base of all optimizers: the settings, and how a run may use the optimizer's state."""

    section: ClassVar[str] = "optimizer"
    package: ClassVar[str] = __name__
    usual: ClassVar[str | None] = "adamw"
    common: ClassVar[tuple[str, ...]] = ("carry_state", "weight_decay", *_RATES.values())

    summary: ClassVar[str]
    by_role: ClassVar[bool] = False  # whether groups of `make` have a `role`, which it takes out
    # what each update does beside the arithmetic of single numbers, which a forecast leaves out but for the
    # memory of it (`update_bytes`)
    not_foretold: ClassVar[str | None] = None

    # start from the moments that `upcycle export --optimizer` left in the source, tiled to experts
    carry_state: bool = False
    weight_decay: Annotated[float, AtLeast(0)] = 0.1  # weight decay of matrices; see `optimizer.decays`
    router_rate: Annotated[float, AtLeast(0)] = 1.0  # factor on the learning rate of routers
    expert_rate: Annotated[float, AtLeast(0)] = 1.0  # factor on the learning rate of routed experts
    rest_rate: Annotated[float, AtLeast(0)] = 1.0  # factor on the learning rate of everything else

    def as_table(self) -> dict[str, Any]:
        """Return the settings as a table, without factors of 1, which older records do not have."""
        return {k: v for k, v in super().as_table().items() if k not in _RATES.values() or v != 1}

    @property
    def moments(self) -> tuple[str, ...]:
        """The parts of the state that have the shape of their parameter, element by element.

        An export writes them, with zeros for parameters that lack one, and a later run takes them for weights
        that are copies.
        """
        return ()

    @property
    def copies(self) -> float:
        """The size of the state, in sizes of the parameters in float32, for a forecast of memory."""
        return len(self.moments)

    def state_bytes(self, width: int, *, outside: bool = False) -> float:
        """Return the bytes of the state for each weight of `width` bytes, in the blocks or outside them."""
        return self.copies * width

    def update_bytes(self, inside: Sequence[int], outside: Sequence[int], width: int) -> float:
        """Return the most bytes that an update holds beside weights, gradients and state, about.

        These are the sizes of a rank's part of each parameter in the blocks and outside them, in numbers of
        `width` bytes. A fused kernel needs none.
        """
        return 0.0

    @property
    def needs_roles(self) -> bool:
        """True if `make` or a rate depends on what a parameter is."""
        return self.by_role or any(getattr(self, key) != 1 for key in _RATES.values())

    def rate(self, role: Role) -> float:
        """Return the factor on the learning rate of a parameter."""
        return float(getattr(self, _RATES[role.kind]))

    @abc.abstractmethod
    def make(self, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        """Make torch's optimizer over `groups`, each with `params` and a `weight_decay`.

        The learning rate is 0 here and is set before every step. With `by_role`, each group has the `role` of
        its parameters (`training/roles.py`), which must not stay in torch's groups: checkpoints hold those.
        """

    def state(self, parameter: Tensor, step: int, moments: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return torch's state of `parameter` after `step` updates with these moments."""
        return dict(moments)

    def carried(
        self, made: torch.optim.Optimizer, parameter: Tensor, step: int, moments: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Return what `state` does, for a parameter of the optimizer that `make` made."""
        return self.state(parameter, step, moments)

    def begun(self, made: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
        """Return the state of a parameter of the optimizer that `make` made, before its first update."""
        import torch

        return self.state(parameter, 0, {name: torch.zeros_like(parameter) for name in self.moments})

    def late_step(self, worked: float, idle: float) -> float:
        """Return the largest step of an expert, over the usual one, that is trained again.

        It had `worked` updates with gradients and `idle` ones without, while others of its stack were
        trained: one count of updates holds for the whole stack.
        """
        return 1.0

    def cannot_shard(self, shape: Sequence[int], dims: Sequence[int]) -> str | None:
        """Return why `parameter` of `shape` cannot be updated if sharded over `dims`; None if it can."""
        return None


def usual() -> Optimizer:
    """Return the default optimizer."""
    return settings.read(Optimizer, {}, "optimizer")


def today(run: Mapping[str, Any]) -> dict[str, Any]:
    """Move the optimizer keys of a run file's table from [train] to [optimizer].

    Older run files have four of them in [train]. Raises `UpcycleError` if both sections have one with
    different values, or if the optimizer has no such key.
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
    """Return the run's table with AdamW's keys in [train], where records have always had them."""
    table = optimizer.as_table()
    if optimizer.name != Optimizer.usual:
        return {**run, "optimizer": table}
    of_train = {key: table.pop(key) for key in _ONCE_OF_TRAIN}
    del table["name"]
    return {**run, "train": {**run["train"], **of_train}, "optimizer": table}


def find(name: str) -> type[Optimizer]:
    """Return the optimizer called `name`."""
    return Optimizer.find(name)


def names() -> list[str]:
    """Return the names of all optimizers."""
    return Optimizer.names()
