"""Peak rate, then a linear decay at the end (MiniCPM, Hu et al. 2024, but with a linear shape)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from upcycle.errors import UpcycleError
from upcycle.settings import AtLeast
from upcycle.training.schedules import Schedule, early, straight_down


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """Peak rate, then linearly down to the floor in the last `decay` steps."""

    summary = "peak, then straight down to floor in the last steps"

    decay: Annotated[int, AtLeast(0)] = 0  # number of steps at the end in which the rate decays

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.decay:
            raise UpcycleError("schedule.name = warmup_stable_decay needs schedule.decay, in steps")

    def after_warmup(self, step: int, total: int) -> float:
        return straight_down(self.peak, self.floor, total - step, self.decay)

    def warnings(self, total: int) -> list[str]:
        return [*early(self.warmup, self.decay, total), *super().warnings(total)]


schedule = WarmupStableDecay
