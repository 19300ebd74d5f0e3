"""Extension points: each file of a folder is one extension, and its file name is its name."""

import importlib
import os
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any

from upcycle.errors import UpcycleError, cut, nearest, shown


def names(package: ModuleType) -> list[str]:
    """Return the names of the files in `package`, except those that begin with an underscore."""
    folders = tuple(package.__path__)
    return [*_names(folders, tuple(_changed(folder) for folder in folders))]


def _changed(folder: str) -> int | None:
    """Return when a file was last added to `folder` or taken out; None if it is no folder of files."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return None


@cache
def _names(folders: tuple[str, ...], _: tuple[int | None, ...]) -> tuple[str, ...]:
    """Read the folders once, and again after a change: a recipe asks for names many times."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(folders) if not m.name.startswith("_")))


def find(package: ModuleType, name: str, attribute: str, what: str) -> Any:
    """Return `attribute` of the file `name` in `package`.

    Raises `UpcycleError`, which lists the known names, if `name` is unknown. `what` names the kind of
    extension.
    """
    known = names(package)
    if not isinstance(name, str):
        raise UpcycleError(f"{what} {shown(name)} is no name; give one of {', '.join(known)}")
    if name not in known:
        raise UpcycleError(f"unknown {what} {cut(name)}{nearest(name, known)}")
    return getattr(importlib.import_module(f"{package.__name__}.{name}"), attribute)
