"""One rate for all steps after the warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from upcycle.training.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """Keeps the peak rate to the end."""

    summary = "peak, to the end"

    def after_warmup(self, step: int, total: int) -> float:
        return self.peak


schedule = Constant
