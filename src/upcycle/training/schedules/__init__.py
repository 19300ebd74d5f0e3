"""The learning rate at every step. One file here is one schedule: its keys and its formula.

A file `NAME.py` defines a frozen dataclass deriving from `Schedule`, bound to the module name `schedule`; its
fields are the keys of `[schedule] name = "NAME"`. No torch here: a run file is read without it.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from upcycle import recipe, registry
from upcycle.errors import UpcycleError

DEFAULT = "cosine"
_SHARED_ONCE = ("decay", "start_step")  # keys that every schedule had; 0 stood for none


@dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    """Warm-up to `peak` in a straight line, then a shape. `floor` is the rate that the shape ends at, if it
    comes down."""

    summary: ClassVar[str]

    peak: float  # the largest rate
    floor: float = 0.0  # the rate at the end
    warmup: int = 0  # steps

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= self.peak < math.inf:
            raise UpcycleError(
                f"schedule.peak = {self.peak:g} and schedule.floor = {self.floor:g}; it must be that "
                f"0 <= floor <= peak"
            )
        steps("warmup", self.warmup)

    @property
    def name(self) -> str:
        """The name in the run file: that of the file."""
        return type(self).__module__.rpartition(".")[2]

    def at(self, step: int, total: int) -> float:
        """The rate of update `step` (0, 1, ...) of `total`."""
        now = self.count(step)
        if self.warmup and now <= self.warmup:
            return self.peak * now / self.warmup
        return self.after_warmup(step, total)

    @abc.abstractmethod
    def after_warmup(self, step: int, total: int) -> float:
        """The rate of update `step` of `total`, once the warm-up is over."""

    def count(self, step: int) -> int:
        """How many updates there have been with update `step`, those of an earlier run included."""
        return step + 1

    def warnings(self, total: int) -> list[str]:
        """What a person should know about this schedule in a run of `total` steps, a sentence each."""
        if not 0 < total <= self.warmup:
            return []
        return [
            f"the run ends after {total:,} steps, inside its warm-up of {self.warmup:,}: the rate never "
            f"reaches schedule.peak; shorten schedule.warmup, or train longer"
        ]

    def continuing(self, stopped: int) -> str | None:
        """What is wrong if the optimizer goes on from step `stopped` of another run, in a sentence."""
        return None


def steps(name: str, value: int) -> None:
    """Raise `UpcycleError` if the key `name` is no number of steps."""
    if value < 0:
        raise UpcycleError(f"schedule.{name} = {value}; it must be 0 or more")


def straight_down(rate: float, floor: float, left: int, decay: int) -> float:
    """The rate with `left` steps to go, if the last `decay` steps go straight from `rate` to `floor`."""
    part = left / decay if decay else 1.0
    return rate if part >= 1 else floor + (rate - floor) * part


def early(warmup: int, decay: int, total: int) -> list[str]:
    """A warning if a run of `total` steps comes down before it has reached its peak."""
    if total <= warmup or warmup + decay <= total:
        return []
    return [
        f"schedule.warmup and decay are {warmup:,} and {decay:,} steps and the run is {total:,}: the rate "
        f"comes down before it has reached schedule.peak; shorten them, or train longer"
    ]


def read(table: Mapping[str, Any]) -> Schedule:
    """The schedule of a table with `name` and its keys.

    Raises `UpcycleError` for an unknown name, and for a key that the schedule does not have.
    """
    options = dict(table)
    name = options.pop("name", DEFAULT)
    found = find(name)
    own = {f.name for f in dataclasses.fields(found)}
    for key in [key for key in options if key not in own]:
        if key in _SHARED_ONCE and options[key] == 0:
            del options[key]
        elif others := [n for n in names() if key in {f.name for f in dataclasses.fields(find(n))}]:
            raise UpcycleError(
                f"schedule.{key} is for {' and '.join(others)}, and schedule.name = {name}; take it out"
            )
    made: Schedule = recipe.read(found, options, "schedule")
    return made


def as_table(schedule: Schedule) -> dict[str, Any]:
    """The settings as a table: what `read` takes, with the keys that records have always had."""
    return {"name": schedule.name, **dict.fromkeys(_SHARED_ONCE, 0), **dataclasses.asdict(schedule)}


def find(name: str) -> type[Schedule]:
    """The schedule called `name`."""
    return registry.find(sys.modules[__name__], name, "schedule", "schedule.name")


def names() -> list[str]:
    """The names of all schedules."""
    return registry.names(sys.modules[__name__])
