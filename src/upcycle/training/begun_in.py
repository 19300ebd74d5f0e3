"""The folder that a run was begun in: the relative paths of its run file count from there.

A recipe has the absolute paths of its files and donors. If a run was moved, what lay below that folder is
looked for below the one where it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.hub import Opener, open_checkpoint
from upcycle.errors import UpcycleError
from upcycle.recipe import OF_EXPERTS
from upcycle.records.run import RunRecord, known_in
from upcycle.training.run import Run

_OF_RECIPE = ("statistics", "labels", "source", "sources", "adapter", "rest")  # keys of paths in a recipe
_KEYS = (*_OF_RECIPE, "path", "tokenizer", "cache", "test", "chat_template", "task_files")  # of a run file


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
    return _followed(path, begun_in)


def recipe_found(run: Mapping[str, Any], begun_in: str | None) -> dict[str, Any]:
    """Return the table of a run with the paths of its recipe as they can be opened here."""
    return _in_recipe(run, lambda path: found(path, begun_in) if Path(path).is_absolute() else path)


def moved(identity: Mapping[str, Any], record: RunRecord | None, out: Path) -> dict[str, Any]:
    """Return the identity of a run with the paths of its recipe where they are if the run was moved."""
    if record is None or record.begun_in is None or _in_place(record, out):
        return dict(identity)
    return _in_recipe(identity, lambda path: _followed(path, record.begun_in))


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
    for path in _paths(run.as_table()):
        here, there = Path(path), Path(found(path, record.begun_in))
        if not there.exists() or (here.exists() and (here.samefile(there) or not _in_place(record, out))):
            continue
        raise UpcycleError(
            f"{path} is {'another one' if here.exists() else 'not'} here; {run.out} was begun in "
            f"{record.begun_in}, from where the paths of its run file count; go on from there"
        )


def _paths(value: Any, key: str = "") -> Iterator[str]:
    """Yield the paths in the table of a run, and hub ids, which look alike."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _paths(inner, name)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _paths(inner, key)
    elif isinstance(value, str) and value and key in _KEYS:
        yield value


def _in_recipe(run: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return the table of a run with the paths of its recipe changed."""

    def changed(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {name: changed(inner, name) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [changed(inner, key) for inner in value]
        return change(value) if isinstance(value, str) and key in _OF_RECIPE else value

    return {key: changed(part) if key in (*OF_EXPERTS, "router") else part for key, part in run.items()}


def _followed(path: str, begun_in: str | None) -> str:
    """Return an absolute path below `begun_in` as the same one below this folder, if that is there."""
    if begun_in is None or not Path(path).is_relative_to(begun_in):
        return path
    here = Path(path).relative_to(begun_in).absolute()
    return str(here) if here.exists() else path


def _in_place(record: RunRecord, out: Path) -> bool:
    """Return whether the run in `out` lies where it was begun, and the folder of its paths is there."""
    if record.begun_in is None or not Path(record.begun_in).is_dir():
        return False
    there = Path(record.begun_in, str(record.run.get("out")))
    return there.exists() and there.samefile(out)
