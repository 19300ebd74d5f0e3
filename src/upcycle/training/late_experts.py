"""Experts that a stage begins to train beside others of their stack, and that then take too large steps.

An optimizer counts the updates of a stack, and not of each expert. AdamW corrects young moments by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from upcycle.training.anatomy import Anatomy
from upcycle.training.course import Course

_FAR = 2.0  # steps that are larger than the usual one by this factor are worth a warning


@dataclass(frozen=True, kw_only=True)
class Past:
    """The updates that the state of an expert has had: those with gradients, then those without."""

    worked: float = 0.0
    idle: float = 0.0

    def after(self, steps: int, *, trained: bool) -> Past:
        """Return the past after further updates, in which the expert is `trained` or kept as it is."""
        if trained:
            return Past(worked=self.worked + self.idle + steps)
        return Past(worked=self.worked, idle=self.idle + steps)


def warnings(course: Course, anatomy: Anatomy | None) -> Iterator[str]:
    """Yield a sentence for each stage in which experts take steps that are far larger than the rate says."""
    if anatomy is None:
        return
    settings = course.run.optimizer
    pasts: dict[str, dict[int, Past]] = {}  # by stack and expert; a stack that nothing trains has no state
    for leg in course.legs:
        trained = anatomy.chosen(leg.run.train.only, leg.run.train.freeze)
        begun = Past(worked=math.inf if settings.carry_state and not leg.first else 0.0)
        pasts = {
            name: pasts.get(name) or dict.fromkeys(range(anatomy.counts[name]), begun) for name in trained
        }
        met = {pasts[name][e] for name, numbers in trained.items() for e in numbers}
        far = max(settings.late_step(past.worked, past.idle) for past in met)
        if far > _FAR:
            yield (
                f"stage {leg.name} begins to train experts beside others of their layer, whose updates the "
                f"optimizer counts for them too, so that their first steps are up to {far:.1f} times as "
                f"large as the rate says; give the stage a schedule.warmup, lower optimizer.beta2 (0.95 is "
                f"safe), or train these experts from the first stage"
            )
        for name, numbers in trained.items():
            pasts[name] = {e: p.after(leg.steps, trained=e in numbers) for e, p in pasts[name].items()}
