"""The inverse square root of the step (Raffel et al. 2020, T5; Sparse Upcycling, appendix A)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from upcycle.errors import UpcycleError
from upcycle.settings import AtLeast
from upcycle.training.schedules import Schedule, early, straight_down


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Schedule):
    """peak x sqrt(warmup / step) after the warm-up.

    `start_step` is the last step of the dense run, so that the rate continues where it stopped. With `decay`,
    the rate goes linearly down to the floor at the end.
    """

    summary = "peak x sqrt(warmup / step)"

    # number of steps at the end in which the rate decays; 0: none
    decay: Annotated[int, AtLeast(0)] = 0
    # the dense run's last step, from which the inverse square root continues
    start_step: Annotated[int, AtLeast(0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.warmup:
            raise UpcycleError("schedule.name = inverse_sqrt needs schedule.warmup, in steps: its time scale")

    def count(self, step: int) -> int:
        return step + 1 + self.start_step

    def after_warmup(self, step: int, total: int) -> float:
        rate = self.peak * math.sqrt(self.warmup / self.count(step))
        return straight_down(rate, self.floor, total - step, self.decay)

    def warnings(self, total: int) -> list[str]:
        found = [*early(self.warming, self.decay, total), *super().warnings(total)]
        if self.warmup_from is not None and not self.warming:
            found.append(
                f"schedule.warmup_from = {self.warmup_from:g} is not heeded: it is the rate before the "
                f"warm-up, and with schedule.start_step = {self.start_step:,} the warm-up of "
                f"{self.warmup:,} steps is over"
            )
        return found

    def continuing(self, stopped: int) -> str | None:
        if stopped == self.start_step:
            return None
        return (
            f"the moments are of step {stopped} and schedule.start_step = {self.start_step}; the rate does "
            f"not go on where it stopped; set schedule.start_step = {stopped}"
        )


schedule = InverseSqrt
