"""Takes a run back to its newest checkpoint, from where it goes on without the batch that harmed it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.records.state import RunState
from upcycle.training import enter, saving
from upcycle.training.anatomy import Anatomy
from upcycle.training.course import Course
from upcycle.training.feeds import Feeds
from upcycle.training.trainee import Trainee


def restore(trainee: Trainee, feeds: Feeds, checkpoint: Path) -> RunState:
    """Fill a model in the stage of a checkpoint, its optimizer and its data with what was saved."""
    saving.load(checkpoint, trainee.model, trainee.optimizer)
    state = saving.read_state(checkpoint)
    if trainee.kept is not None:
        trainee.kept.remember()
    if trainee.recent is not None:
        trainee.recent.restore(state.recent or ())
    feeds.restore(dict(state.batches))
    return state


def go(
    trainee: Trainee,
    course: Course,
    anatomy: Anatomy | None,
    feeds: Feeds,
    state: RunState,
    checkpoint: Path,
    batch: int,
    returns: Counter[int],
) -> tuple[Trainee, RunState]:
    """Go back to `checkpoint` and leave out batch number `batch`; return the model and the state there.

    `returns` counts how often the run went back to each checkpoint. Raises `UpcycleError` if it was too
    often.
    """
    step = saving.read_state(checkpoint).step
    returns[step] += 1
    if returns[step] > (most := course.run.spikes.most):
        raise UpcycleError(
            f"the run went back to step {step} {most} times (spikes.most) and met a bad step again; "
            f"{checkpoint.name} is kept; lower schedule.peak, or look at the data"
        )
    trainee = enter.next_stage(trainee, course.after(step), anatomy)
    restored = restore(trainee, feeds, checkpoint)
    return trainee, replace(restored, passed=tuple(sorted({*restored.passed, *state.passed, batch})))
