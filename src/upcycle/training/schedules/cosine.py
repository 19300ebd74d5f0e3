"""Half a cosine from peak to floor (Loshchilov and Hutter, ICLR 2017, without restarts)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from upcycle.training.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from peak to floor, from the end of the warm-up to the end of the run."""

    summary = "half a cosine from peak to floor"

    def after_warmup(self, step: int, total: int) -> float:
        done = (step - self.warmup) / max(1, total - self.warmup)
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2


schedule = Cosine
