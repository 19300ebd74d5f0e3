"""The step that is foretold: the model, the layout, the rows of a rank, the precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from upcycle.blueprints.blueprint import Blueprint
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError
from upcycle.families._wrappers import TEXT
from upcycle.forecast import groups
from upcycle.forecast.groups import Group
from upcycle.sharding.layout import Layout

Precision = Literal["mixed", "float32", "bfloat16"]
F32 = 4
Recompute = bool | Literal["selective"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One step of `upcycle train`. Every rank sees the most loaded rank's sizes, and routing is even.

    Raises `UpcycleError` for experts in a vision tower, which such a step does not reach.
    """

    built: Blueprint
    layout: Layout
    lengths: Mapping[str, int]  # tokens of a row in each stack of blocks
    rows: int = 1  # rows of one forward pass on one rank (train.micro_batch)
    passes: int = 1  # forward passes of a step on one rank, whose gradients are added
    precision: Precision = "mixed"  # train.precision
    recompute: Recompute = False  # train.activation_checkpointing
    # bytes that the optimizer keeps for each weight inside the blocks and outside them; None: two moments
    state: tuple[float, float] | None = None
    # the most bytes that an update holds beside all that, by the sizes of a rank's parameters inside the
    # blocks and outside them; None: none
    update: Callable[[Sequence[int], Sequence[int]], float] | None = None
    trained: frozenset[str] | None = None  # the parameters in memory that have gradients; None: all
    effort: float = 3  # forward passes that a step is worth, in arithmetic, without a teacher
    teacher: Dense | None = None  # a model that runs beside the steps, without gradients
    masked: bool = False  # whether documents are kept apart by masks

    def __post_init__(self) -> None:
        if (part := self.built.recipe.moe.part) != TEXT:
            raise UpcycleError(
                f"moe.part = {part}: a step of `upcycle train` reads texts, which never reach a vision "
                f"tower, so there is no forecast for its experts; set moe.part = text"
            )

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups of parameters, in the order of the forward pass."""
        return groups.of(self.built, self.layout, self.precision)

    @property
    def stored(self) -> int:
        """The bytes of a weight and of its gradient."""
        return 2 if self.precision == "bfloat16" else 4

    def stored_in(self, group: Group) -> int:
        """Return the bytes of a weight of a group, and of its gradient."""
        return F32 if group.wide else self.stored

    def width_in(self, group: Group) -> int:
        """Return the bytes of a gathered weight of a group."""
        return F32 if group.wide else self.width

    def state_in(self, group: Group) -> float:
        """Return the bytes of the optimizer's state for each weight of a group that is trained."""
        inside, outside = self.state or (2.0 * self.stored, 2.0 * self.stored)
        return outside if group.block is None else inside

    @property
    def width(self) -> int:
        """The bytes of a number in the arithmetic."""
        return 4 if self.precision == "float32" else 2

    @property
    def sharded(self) -> bool:
        """True if FSDP is at work at all."""
        return self.layout.dp > 1

    def tokens(self, stack: str) -> int:
        """Return the tokens of one forward pass in a stack."""
        return self.rows * self.lengths[stack]
