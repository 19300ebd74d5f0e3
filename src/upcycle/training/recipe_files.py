"""The files that a recipe reads besides checkpoints, and what to say if its blueprint is another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import upcycle
from upcycle.checkpoints.checkpoint import file_hash
from upcycle.recipe import Recipe

FileHashes = Mapping[str, str]  # SHA-256 of each file, by its key in the recipe

_KEYS = ("statistics", "labels")


def of(recipe: Recipe | None) -> dict[str, Path]:
    """Return the files that a recipe reads besides checkpoints, by their keys."""
    return {} if recipe is None else dict(_of(recipe.as_table()))


def hashes(recipe: Recipe | None) -> FileHashes:
    """Return the hashes of the files of a recipe."""
    return {key: file_hash(path) for key, path in of(recipe).items()}


def changed(recipe: Recipe | None, before: FileHashes | None, since: str) -> str | None:
    """Return a sentence that names the first file of a recipe that has changed; None if none has.

    `before` is None in the record of an earlier version, which knows no files: then any may have changed.
    It is asked once the blueprint is another one, because a file may be written anew and say the same.
    """
    for key, path in of(recipe).items():
        if before is None or file_hash(path) != before.get(key):
            may = "may have changed" if before is None else "changed"
            return f"{key} = {path} {may} since {since}; put the file back as it was, or start a new run"
    return None


def of_another_version(version: str | None) -> str:
    """Return a sentence about a run whose model this version plans otherwise than `version`, which began it.

    Neither a checkpoint nor a file of the recipe has changed.
    """
    now = upcycle.__version__
    other = version not in (None, now)
    then = f"upcycle {version} did" if other else "it did"
    back = f"go on with upcycle {version}" if other else "go on with the installation that it began with"
    return (
        f"upcycle {now} makes another model of the source and the recipe than {then} when the run began; "
        f"{back}, or start a new run"
    )


def _of(table: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Path]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _of(value, f"{place}{key}.")
        elif key in _KEYS and value:
            yield f"{place}{key}", Path(value)
