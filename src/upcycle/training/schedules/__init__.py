"""Learning rate schedules. Each file here is one: its keys and its formula.

A file `NAME.py` defines a frozen dataclass derived from `Schedule` and binds it to the module name
`schedule`; its fields are the keys of `[schedule] name = "NAME"`. These files do not import torch, because
run files are read without it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from upcycle.errors import UpcycleError
from upcycle.settings import AtLeast, Named, keys

_ONCE_SHARED = ("decay", "start_step")  # keys that every schedule had in older run files; 0 meant unset


@dataclass(frozen=True, kw_only=True)
class Schedule(Named, abc.ABC):
    """A linear warm-up to `peak`, then the shape of the schedule. `floor` is the final rate if it decays.

    A warm-up from 0 warms a trained model up anew. With `warmup_from`, the rate that the dense run ended
    with, a run goes on there and comes to its peak without a jump (Ibrahim et al. 2024).
    """

    section: ClassVar[str] = "schedule"
    package: ClassVar[str] = __name__
    usual: ClassVar[str | None] = "cosine"
    common: ClassVar[tuple[str, ...]] = ("peak", "floor", "warmup", "warmup_from")

    summary: ClassVar[str]

    peak: float  # the largest learning rate
    floor: float = 0.0  # the learning rate at the end
    warmup: Annotated[int, AtLeast(0)] = 0  # number of warm-up steps
    # the learning rate before the warm-up, which may be above the peak; None: 0
    warmup_from: Annotated[float, AtLeast(0)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= self.peak < math.inf:
            raise UpcycleError(
                f"schedule.peak = {self.peak:g} and schedule.floor = {self.floor:g}; it must be that "
                f"0 <= floor <= peak"
            )
        if self.warmup_from is not None and not self.warmup:
            raise UpcycleError("schedule.warmup_from is the rate before the warm-up; set schedule.warmup")

    def at(self, step: int, total: int) -> float:
        """Return the learning rate of update `step` (0, 1, ...) of `total`."""
        now = self.count(step)
        if self.warmup and now <= self.warmup:
            begin = self.warmup_from or 0.0
            return begin + (self.peak - begin) * now / self.warmup
        return self.after_warmup(step, total)

    @abc.abstractmethod
    def after_warmup(self, step: int, total: int) -> float:
        """Return the learning rate of update `step` of `total` after the warm-up."""

    def count(self, step: int) -> int:
        """Return the number of updates including update `step`, and those of an earlier run."""
        return step + 1

    @property
    def warming(self) -> int:
        """The number of this run's updates in the warm-up; an earlier run may have had some of it."""
        return max(0, self.warmup - self.count(-1))

    def warnings(self, total: int) -> list[str]:
        """Return warnings about this schedule in a run of `total` steps, one sentence each."""
        if not 0 < total <= self.warming:
            return []
        return [
            f"the run ends after {total:,} steps, inside its warm-up of {self.warming:,}: the rate never "
            f"reaches schedule.peak; shorten schedule.warmup, or train longer"
        ]

    def continuing(self, stopped: int) -> str | None:
        """Return a warning if step `stopped` of the earlier run does not fit this schedule; else None."""
        return None


def straight_down(rate: float, floor: float, left: int, decay: int) -> float:
    """Return the rate with `left` steps to go, if it falls linearly to `floor` in the last `decay`."""
    part = left / decay if decay else 1.0
    return rate if part >= 1 else floor + (rate - floor) * part


def early(warmup: int, decay: int, total: int) -> list[str]:
    """Return warnings if a run of `total` steps decays before it has reached its peak."""
    if total <= warmup or warmup + decay <= total:
        return []
    return [
        f"the warm-up and the decay take {warmup:,} and {decay:,} steps and the run is {total:,}: the rate "
        f"comes down before it has reached schedule.peak; shorten them, or train longer"
    ]


def today(run: Mapping[str, Any]) -> dict[str, Any]:
    """Drop zeros from [schedule] of a run file's table if its schedule has no such key.

    Raises `UpcycleError` for other values of keys that belong to another schedule.
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
            kept[key] = value  # the reader refuses this unknown key
    return {**run, "schedule": kept}


def as_recorded(schedule: Schedule) -> dict[str, Any]:
    """Return a schedule's table with the keys that records have always had."""
    return {**dict.fromkeys(_ONCE_SHARED, 0), **schedule.as_table()}


def find(name: str) -> type[Schedule]:
    """Return the schedule called `name`."""
    return Schedule.find(name)


def names() -> list[str]:
    """Return the names of all schedules."""
    return Schedule.names()
