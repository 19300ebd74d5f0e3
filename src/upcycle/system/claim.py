"""Which paths a command may make, write over or delete: nothing that this program did not write.

A folder is made as NAME.partial with a marker in it, a file that tells whose work it is. What has no marker
is somebody else's, and stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from upcycle.errors import UpcycleError

MARKER = ".upcycle-partial"
"""The marker of a folder whose work leaves no other sign, such as a journal."""


def resolved(path: Path) -> Path:
    """The place that `path` leads to; links that lead in a circle are refused."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UpcycleError(f"{str(path)!r} leads nowhere ({error}); give another path") from None


def may_create(path: Path) -> None:
    """Refuse a path where something is already, and one that nothing can be made at."""
    if path.is_symlink():
        resolved(path)
        if not path.exists():
            raise UpcycleError(
                f"{path} is a link to {os.readlink(path)}, where nothing is; give that path itself"
            )
    if os.path.lexists(path):
        raise UpcycleError(f"{path} exists already; nothing is overwritten. Choose another name or delete it")
    if not path.name:
        raise UpcycleError(f"{str(path)!r} names no file or folder to make; give another path")
    refuse_below_a_file(path)


def may_replace(path: Path, ours: Callable[[Path], bool], what: str) -> None:
    """Refuse a file that is there, unless `ours` knows it for `what`, which this program wrote."""
    if not os.path.lexists(path):
        return may_create(path)
    if not path.is_file() or not ours(path):
        raise UpcycleError(
            f"{path} exists already and is not {what}; nothing is overwritten. Choose another name or delete "
            f"it"
        )
    return None


def refuse_below_a_file(path: Path) -> None:
    """Refuse a path of which a part is a file."""
    parents = resolved(path).parents
    if not parents[0].is_dir() and any(p.exists() and not p.is_dir() for p in parents):
        raise UpcycleError(f"{path}: a part of the path is a file")


def refuse_near(paths: Iterable[Path], source: Path) -> None:
    """Refuse `paths` where one of them lies in the folder `source`, or around it."""
    there = resolved(source)
    for path in map(resolved, paths):
        if path == there or there in path.parents or path in there.parents:
            raise UpcycleError(f"{path} lies in or around the source {source}; choose another folder")


def partial_of(out: Path) -> Path:
    """Where the folder `out` is made until it is whole."""
    target = resolved(out)
    return target.parent / f"{target.name}.partial"


def is_ours(folder: Path, marker: str = MARKER) -> bool:
    """Whether a folder was begun by this program, or has nothing in it that could be lost.

    A link is none, nor is a folder with links in it, which would be written through.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        there = list(folder.iterdir())
    except FileNotFoundError:  # whoever wrote it has just given it its name
        return True
    return not any(path.is_symlink() for path in there) and ((folder / marker).is_file() or not there)


def refuse_foreign(folder: Path, marker: str = MARKER) -> None:
    """Refuse a folder to work in that is there and was not begun by this program."""
    # Asked again: whoever wrote it may just have given it its name.
    if os.path.lexists(folder) and not is_ours(folder, marker) and os.path.lexists(folder):
        raise UpcycleError(f"{folder} is in the way, and it was not left by upcycle; choose another OUT")


def begin(folder: Path, marker: str = MARKER) -> None:
    """Make the folder with its marker, in place of one that this program left; of any other, an error."""
    discard(folder, marker)
    folder.mkdir(parents=True)
    (folder / marker).touch()


def finish(folder: Path, out: Path, marker: str = MARKER) -> None:
    """Give the folder its name, without the marker; `out` must not be there."""
    may_create(out)
    folder.rename(out)
    (out / marker).unlink(missing_ok=True)


def discard(folder: Path, marker: str = MARKER) -> None:
    """Delete a folder that this program begun; a folder that is not there is well, any other an error."""
    refuse_foreign(folder, marker)
    if folder.exists():
        shutil.rmtree(folder)
