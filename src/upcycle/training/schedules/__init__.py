"""The learning rate at every step. One file here is one schedule: its keys and its formula.

A file `NAME.py` defines a frozen dataclass deriving from `Schedule`, bound to the module name `schedule`; its
fields are the keys of `[schedule] name = "NAME"`. No torch here: a run file is read without it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from upcycle.errors import UpcycleError
from upcycle.settings import AtLeast, Named, keys

_ONCE_SHARED = ("decay", "start_step")  # keys that every schedule had; 0 stood for none


@dataclass(frozen=True, kw_only=True)
class Schedule(Named, abc.ABC):
    """Warm-up to `peak` in a straight line, then a shape. `floor` is the rate that the shape ends at, if it
    comes down."""

    section: ClassVar[str] = "schedule"
    package: ClassVar[str] = __name__
    usual: ClassVar[str | None] = "cosine"
    common: ClassVar[tuple[str, ...]] = ("peak", "floor", "warmup")

    summary: ClassVar[str]

    peak: float  # the largest rate
    floor: float = 0.0  # the rate at the end
    warmup: Annotated[int, AtLeast(0)] = 0  # steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= self.peak < math.inf:
            raise UpcycleError(
                f"schedule.peak = {self.peak:g} and schedule.floor = {self.floor:g}; it must be that "
                f"0 <= floor <= peak"
            )

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


def today(run: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a run file without the zeros of [schedule] that its schedule has no key for.

    Raises `UpcycleError` for other values of keys that are another schedule's.
    """
    table = run.get("schedule")
    if not isinstance(table, Mapping):
        return dict(run)
    chosen = Schedule.chosen(table.get("name"))
    kept = {}
    for key, value in table.items():
        if key == "name" or key in keys(chosen):
            kept[key] = value
        elif others := [name for name in names() if key in keys(find(name))]:
            if key not in _ONCE_SHARED or value != 0:
                raise UpcycleError(
                    f"schedule.{key} is for {' and '.join(others)}, and schedule.name = "
                    f"{table.get('name', Schedule.usual)}; take it out"
                )
        else:
            kept[key] = value  # an unknown key, which the reader refuses
    return {**run, "schedule": kept}


def as_recorded(schedule: Schedule) -> dict[str, Any]:
    """The table of a schedule with the keys that records have always had."""
    return {**dict.fromkeys(_ONCE_SHARED, 0), **schedule.as_table()}


def find(name: str) -> type[Schedule]:
    """The schedule called `name`."""
    return Schedule.find(name)


def names() -> list[str]:
    """The names of all schedules."""
    return Schedule.names()
