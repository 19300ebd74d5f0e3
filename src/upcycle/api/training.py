"""`upcycle.train`, and what it would do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.blueprints.making import blueprint
from upcycle.checkpoints import hub
from upcycle.dense.admission import admit
from upcycle.errors import UpcycleError
from upcycle.system.needed import said_if_missing
from upcycle.system.progress import Progress, reporting_to
from upcycle.training.begun_in import refuse_elsewhere
from upcycle.training.course import Course
from upcycle.training.run import Run

if TYPE_CHECKING:
    from upcycle.training.loop import Result
    from upcycle.training.rehearsal import Rehearsal


@said_if_missing()
def train(
    run: Run | Mapping[str, Any] | str | Path, *, resume: bool = False, progress: Progress | None = None
) -> Result:
    """Train as `run` (a run, its table, or its file) says, in one process or as one process of torchrun.

    `resume` continues from the newest checkpoint in `run.out`, bit for bit in a single process; without a
    checkpoint, training starts at step 0. SIGTERM saves a checkpoint and returns an unfinished result. Raises
    `UpcycleError` for settings or data that cannot be used.
    """
    asked = Run.of(run)
    if resume:
        refuse_elsewhere(asked)
    refuse_what_cannot_begin(asked)  # before torch is imported, which takes seconds
    from upcycle.evaluation.exam import HarnessExaminer
    from upcycle.training import loop

    with reporting_to(progress):
        return loop.train(asked, resume=resume, examiner=HarnessExaminer())


@said_if_missing()
def rehearse(run: Run | Mapping[str, Any] | str | Path, *, world: int = 1) -> Rehearsal:
    """Return what a run would be in a world of so many processes, without data, a GPU, or a file written.

    Raises `UpcycleError` for what a run would refuse before its first step.
    """
    asked = Run.of(run)
    refuse_what_cannot_begin(asked)
    from upcycle.evaluation.exam import HarnessExaminer
    from upcycle.training import rehearsal

    return rehearsal.rehearse(asked, world, HarnessExaminer())


def refuse_what_cannot_begin(run: Run) -> None:
    """Raise `UpcycleError` if a run cannot begin because of its source, its recipe or its data."""
    hub.refuse_missing(run.source)
    if not run.from_scratch and not hub.is_id(run.source):
        with hub.open_checkpoint(run.source) as opened:
            if run.recipe is None:
                admit(opened, drop=run.drop)
            else:
                blueprint(opened, run.recipe)
    for source in (each for leg in Course(run).legs for each in leg.run.data.sources):
        if not source.path.startswith("hf:") and not Path(source.path).exists():
            raise UpcycleError(f"no data at {source.path}")
