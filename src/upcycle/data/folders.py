"""The files in a folder of data."""

from __future__ import annotations

import errno
import heapq
import os
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path

from upcycle.errors import UpcycleError

_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # what the system says of a link that leads nowhere


def files_below(folder: Path) -> list[Path]:
    """Return all files in a folder and in the folders within it, sorted.

    Links to folders are followed. A folder that can be reached by several ways is entered once, so that a
    link to a folder around it does no harm; the way without links comes first. A link that leads nowhere is
    no file. Raises `UpcycleError` for a folder or a link that this user may not read.
    """
    return sorted(Path(entry.path) for entry, _ in _walked(folder))


def behind_links(folder: Path) -> list[tuple[Path, Path]]:
    """Return what `files_below` does, and with each file where it lies behind all links.

    It asks the system once for a folder and once for a link, but not for a file.
    """
    found = (
        (
            Path(entry.path),
            Path(os.path.realpath(entry.path) if entry.is_symlink() else f"{place}/{entry.name}"),
        )
        for entry, place in _walked(folder)
    )
    return sorted(found, key=itemgetter(0))


def _walked(folder: Path) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Yield each file below a folder, and where the folder that holds it lies behind all links."""
    entered: set[str] = set()
    plain, linked = [str(folder)], list[str]()
    while plain or linked:
        here = plain.pop() if plain else heapq.heappop(linked)
        if (place := os.path.realpath(here)) in entered:
            continue
        entered.add(place)
        with _readable(here), os.scandir(here) as entries:
            there = list(entries)
        for entry in there:
            match _kind(entry), entry.is_symlink():
                case "file", _:
                    yield entry, place
                case "folder", True:
                    heapq.heappush(linked, entry.path)
                case "folder", False:
                    plain.append(entry.path)


def put_back(path: str) -> str:
    """Return what to do about data of which a run that goes on had more or less, as a part of a sentence.

    Older versions did not follow links to folders, nor read files whose endings have capital letters, nor
    images of some endings.
    """
    said = "put the data back as it was"
    if not Path(path).is_dir():
        return said
    return (
        f"{said} (if links to folders and endings in capital letters did not count when the run began, nor "
        f"images such as .gif and .tif, take these files out)"
    )


def _kind(entry: os.DirEntry[str]) -> str | None:
    """Return whether an entry is a file or a folder, behind all links; None if it is neither."""
    with _readable(entry.path):
        try:
            return "file" if entry.is_file() else "folder" if entry.is_dir() else None
        except OSError as error:
            if error.errno not in _NOWHERE:
                raise
    return None


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Raise `UpcycleError` if the system refuses to read what is at `path`."""
    try:
        yield
    except OSError as error:
        raise UpcycleError(
            f"{path} cannot be read: {error.strerror}; let this user read it, or name the other files and "
            f"folders there one by one"
        ) from None
