"""The files in a folder of data."""

from __future__ import annotations

import os
from pathlib import Path


def files_below(folder: Path) -> list[Path]:
    """Return all files in a folder and in the folders within it, sorted.

    Links to folders are followed. A folder that can be reached by several ways is entered once, so that a
    link to a folder around it does no harm; the way without links comes first.
    """
    found: list[Path] = []
    entered: set[str] = set()
    ahead = [folder]
    while ahead:
        linked = []
        for start in ahead:
            for here, folders, names in os.walk(
                start
            ):  # which lists links to folders and does not enter them
                if (place := os.path.realpath(here)) in entered:
                    folders.clear()
                    continue
                entered.add(place)
                linked += [path for name in folders if (path := Path(here, name)).is_symlink()]
                found += [path for name in names if (path := Path(here, name)).is_file()]
        ahead = sorted(linked)
    return sorted(found)
