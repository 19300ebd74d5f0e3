"""Checks of the paths that a command may create, overwrite or delete: only those this program wrote.

A folder is built as NAME.partial with a marker, a file that tells which program is at work. A folder without
a marker belongs to somebody else and stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.system import whole_file

MARKER = ".upcycle-partial"
"""The marker of a folder whose work leaves no other sign, such as a journal."""


def resolved(path: Path) -> Path:
    """Return the path with links resolved; raise an error for links in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UpcycleError(f"{str(path)!r} leads nowhere ({error}); give another path") from None


def may_create(path: Path) -> None:
    """Raise an error for a path that exists or cannot be created, because of permissions for example."""
    if path.is_symlink():
        resolved(path)
        if not path.exists():
            raise UpcycleError(
                f"{path} is a link to {os.readlink(path)}, which does not exist; give that path itself"
            )
    if os.path.lexists(path):
        raise UpcycleError(f"{path} exists already; nothing is overwritten. Choose another name or delete it")
    if not path.name:
        raise UpcycleError(f"{str(path)!r} names no file or folder to make; give another path")
    refuse_below_a_file(path)
    home = next(parent for parent in resolved(path).parents if parent.exists())
    if not os.access(home, os.W_OK):
        raise UpcycleError(f"{home} cannot be written to; check its permissions")


def may_replace(path: Path, ours: Callable[[Path], bool], what: str) -> None:
    """Raise an error for an existing file that `ours` does not recognise as `what`."""
    if not os.path.lexists(path):
        return may_create(path)
    if not path.is_file() or not ours(path):
        raise UpcycleError(
            f"{path} exists already and is not {what}; nothing is overwritten. Choose another name or delete "
            f"it"
        )
    return None


def refuse_below_a_file(path: Path) -> None:
    """Raise an error for a path that goes through a file."""
    parents = resolved(path).parents
    if not parents[0].is_dir() and any(p.exists() and not p.is_dir() for p in parents):
        raise UpcycleError(f"{path}: a part of the path is a file")


def refuse_near(paths: Iterable[Path], source: Path) -> None:
    """Raise an error if one of `paths` is inside the folder `source`, or contains it."""
    there = resolved(source)
    for path in map(resolved, paths):
        if path == there or there in path.parents or path in there.parents:
            raise UpcycleError(f"{path} lies in or around the source {source}; choose another folder")


def partial_of(out: Path) -> Path:
    """Return the path at which the folder `out` is built until it is complete."""
    target = resolved(out)
    return target.parent / f"{target.name}.partial"


def is_ours(folder: Path, marker: str = MARKER) -> bool:
    """Return whether a folder was begun by this program, or holds nothing that could be lost.

    A link is not ours, nor is a folder with links in it, because files would be written through them.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        there = list(folder.iterdir())
    except FileNotFoundError:  # the process that wrote it has just renamed it
        return True
    return not any(path.is_symlink() for path in there) and ((folder / marker).is_file() or not there)


def refuse_foreign(folder: Path, marker: str = MARKER) -> None:
    """Raise an error for a folder that exists and was not begun by this program."""
    # This is checked again, because the process that wrote it may just have renamed it.
    if os.path.lexists(folder) and not is_ours(folder, marker) and os.path.lexists(folder):
        raise UpcycleError(f"{folder} is in the way, and it was not left by upcycle; choose another OUT")


def begin(folder: Path, marker: str = MARKER) -> None:
    """Create the folder with its marker, and replace a folder of this program; any other raises an error."""
    discard(folder, marker)
    folder.mkdir(parents=True)
    (folder / marker).touch()


def finish(folder: Path, out: Path, marker: str = MARKER) -> None:
    """Rename the finished folder to `out`, without the marker; `out` must not exist.

    All of it is on disk by then, so that a loss of power leaves no half of it under that name.
    """
    may_create(out)
    whole_file.sync_all(folder)
    folder.rename(out)
    (out / marker).unlink(missing_ok=True)
    whole_file.sync_folder(resolved(out).parent)


def discard(folder: Path, marker: str = MARKER) -> None:
    """Delete a folder that this program began; do nothing if it is missing, and raise an error for others."""
    refuse_foreign(folder, marker)
    if folder.exists():
        shutil.rmtree(folder)
