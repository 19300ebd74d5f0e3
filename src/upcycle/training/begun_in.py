"""The folder that a run was begun in: the relative paths of its run file count from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.hub import Opener, open_checkpoint
from upcycle.errors import UpcycleError
from upcycle.records.reader import load
from upcycle.records.run import RunRecord
from upcycle.training.course import Course
from upcycle.training.run import Run


def working_folder() -> str | None:
    """Return the folder that this process works in; None if it was removed."""
    try:
        return str(Path.cwd())
    except OSError:
        return None


def found(path: str, begun_in: str | None) -> str:
    """Return a path of a run as it can be opened here: as it is, or from where the run was begun.

    A hub id, and a path that is in neither place, are returned as they are.
    """
    if begun_in is None or Path(path).exists():
        return path
    there = Path(begun_in) / path
    return str(there) if there.exists() else path


def opener(begun_in: str | None) -> Opener:
    """Return what opens the checkpoints of a run wherever it is called."""

    def opened(source: str | Path, **options: Any) -> Checkpoint:
        return open_checkpoint(found(str(source), begun_in), **options)

    return opened


def refuse_elsewhere(run: Run) -> None:
    """Raise `UpcycleError` for a run that goes on where its paths lead nowhere, if they do where it began."""
    file = Path(run.out) / RunRecord.FILE
    try:
        record = RunRecord.of(load(file, ""), str(file))
    except UpcycleError:
        return  # there is none, or it is damaged, which is said later
    data = [source.path for leg in Course(run).legs for source in leg.run.data.sources]
    if lost := [path for path in (run.source, *data) if found(path, record.begun_in) != path]:
        raise UpcycleError(
            f"{lost[0]} is not here; {run.out} was begun in {record.begun_in}, from where the paths of its "
            f"run file count; go on from there"
        )
