"""The learning rate at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from upcycle.errors import UpcycleError
from upcycle.settings import AtLeast, Settings


@dataclass(frozen=True, kw_only=True)
class Schedule(Settings):
    """Warm-up to `peak`, then a shape that ends at `floor`.

    - `cosine`: half a cosine from peak to floor.
    - `warmup_stable_decay`: peak, then straight down to floor in the last `decay` steps.
    - `inverse_sqrt`: peak * sqrt(warmup / step) after the warm-up; `start_step` is the dense run's last step,
      so that the rate goes on where it stopped. With `decay`, straight down to floor at the end.
    - `constant`: peak.
    """

    section: ClassVar[str] = "schedule"

    # the shape of the rate after the warm-up
    name: Literal["cosine", "warmup_stable_decay", "inverse_sqrt", "constant"] = "cosine"
    peak: float  # the largest rate
    floor: float = 0.0  # the rate at the end
    warmup: Annotated[int, AtLeast(0)] = 0  # steps
    decay: Annotated[int, AtLeast(0)] = 0  # steps
    # the dense run's last step, where an inverse square root goes on
    start_step: Annotated[int, AtLeast(0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= self.peak < math.inf:
            raise UpcycleError(
                f"schedule.peak = {self.peak:g} and schedule.floor = {self.floor:g}; it must be that "
                f"0 <= floor <= peak"
            )
        if self.name == "warmup_stable_decay" and not self.decay:
            raise UpcycleError("schedule.name = warmup_stable_decay needs schedule.decay, in steps")
        if self.name == "inverse_sqrt" and not self.warmup:
            raise UpcycleError("schedule.name = inverse_sqrt needs schedule.warmup, in steps: its time scale")
        if self.decay and self.name in ("cosine", "constant"):
            raise UpcycleError(f"schedule.decay has no meaning in {self.name}; take it out")
        if self.start_step and self.name != "inverse_sqrt":
            raise UpcycleError("schedule.start_step is for inverse_sqrt; take it out")

    def at(self, step: int, total: int) -> float:
        """The rate of update `step` (0, 1, ...) of `total`."""
        now = step + 1 + self.start_step
        if self.warmup and now <= self.warmup:
            return self.peak * now / self.warmup
        if self.name == "constant":
            return self.peak
        if self.name == "cosine":
            done = (step - self.warmup) / max(1, total - self.warmup)
            return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2
        rate = self.peak
        if self.name == "inverse_sqrt":
            rate *= math.sqrt(self.warmup / now)
        left = (total - step) / self.decay if self.decay else 1.0
        return rate if left >= 1 else self.floor + (rate - self.floor) * left
