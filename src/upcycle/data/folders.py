"""The files in a folder of data."""

from __future__ import annotations

import heapq
import os
from pathlib import Path


def files_below(folder: Path) -> list[Path]:
    """Return all files in a folder and in the folders within it, sorted.

    Links to folders are followed. A folder that can be reached by several ways is entered once, so that a
    link to a folder around it does no harm; the way without links comes first. A folder that may not be
    listed counts as empty.
    """
    found: list[Path] = []
    entered: set[str] = set()
    plain, linked = [str(folder)], list[str]()
    while plain or linked:
        here = plain.pop() if plain else heapq.heappop(linked)
        if (place := os.path.realpath(here)) in entered:
            continue
        entered.add(place)
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.is_file():
                        found.append(Path(entry.path))
                    elif entry.is_dir() and entry.is_symlink():
                        heapq.heappush(linked, entry.path)
                    elif entry.is_dir():
                        plain.append(entry.path)
        except PermissionError:
            continue
    return sorted(found)
