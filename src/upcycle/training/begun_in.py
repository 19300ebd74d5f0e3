"""The folder that a run was begun in: the relative paths of its run file count from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.hub import Opener, open_checkpoint
from upcycle.errors import UpcycleError
from upcycle.records.run import RunRecord, known_in
from upcycle.training.course import Course
from upcycle.training.run import Run


def to_record(before: RunRecord | None, out: Path) -> str | None:
    """Return the folder for the record of a run in `out`; None if this process works in a removed one.

    It is the folder that the record `before` has, unless the run was moved: then its paths count from where
    it goes on.
    """
    if before is not None and _in_place(before, out):
        return before.begun_in
    try:
        return str(Path.cwd())
    except OSError:
        return None


def found(path: str, begun_in: str | None) -> str:
    """Return a path of a run as it can be opened here: from where the run was begun, or else as it is.

    A hub id, and a path that is in neither place, are returned as they are.
    """
    if begun_in is not None and (there := Path(begun_in, path)).exists():
        return str(there)
    return path


def opener(begun_in: str | None) -> Opener:
    """Return what opens the checkpoints of a run wherever it is called."""

    def opened(source: str | Path, **options: Any) -> Checkpoint:
        return open_checkpoint(found(str(source), begun_in), **options)

    return opened


def refuse_elsewhere(run: Run) -> None:
    """Raise `UpcycleError` for a run that goes on where its paths lead to other places than where it began.

    A run that was moved may go on beside copies of its files; what is in them is compared later.
    """
    record = known_in(out := Path(run.out))
    if record is None:
        return
    data = [source.path for leg in Course(run).legs for source in leg.run.data.sources]
    for path in (run.source, *data):
        here, there = Path(path), Path(found(path, record.begun_in))
        if not there.exists() or (here.exists() and (here.samefile(there) or not _in_place(record, out))):
            continue
        raise UpcycleError(
            f"{path} is {'another one' if here.exists() else 'not'} here; {run.out} was begun in "
            f"{record.begun_in}, from where the paths of its run file count; go on from there"
        )


def _in_place(record: RunRecord, out: Path) -> bool:
    """Return whether the run in `out` lies where it was begun, and the folder of its paths is there."""
    if record.begun_in is None or not Path(record.begun_in).is_dir():
        return False
    there = Path(record.begun_in, str(record.run.get("out")))
    return there.exists() and there.samefile(out)
