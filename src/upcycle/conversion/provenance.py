"""`upcycle.json`: what a folder was made from, how, and by what. Written by `convert`, read by the rest."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import upcycle
from upcycle.blueprints.blueprint import Blueprint
from upcycle.checkpoints.checkpoint import Checkpoint, read_json
from upcycle.errors import UpcycleError, listed

FILE = "upcycle.json"
FORMAT = 1


def record(
    built: Blueprint,
    hashes: dict[str, dict[str, str]],
    *,
    carried: list[str],
    left_behind: list[str],
    files: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The provenance of a folder. It holds no time, so that a recipe run twice gives equal folders.

    `files` are the hashes of what was written beside the weights.
    """
    return {
        "format": FORMAT,
        "upcycle_version": upcycle.__version__,
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
        "source": {
            "name": built.source.name,
            "path": _place(built.source),
            "model_type": built.dense.family.model_type,
            "sha256": hashes[built.source.label],
            "donors": {
                c.label: {"name": c.name, "path": _place(c), "sha256": hashes[c.label]}
                for c in built.checkpoints[1:]
            },
        },
        "target": built.target.model_type,
        "recipe": built.recipe.as_table(),
        "blueprint_hash": built.hash,
        "preserves_function": built.preserves_function,
        "moe_layers": built.moe_layers,
        "left_out_tensors": dict(built.left_out),
        "left_out_config_keys": [key for key in built.dense.unknown_keys if key not in built.config],
        "carried_files": carried,
        "left_behind_files": left_behind,
        **({} if files is None else {"files": files}),
    }


def of_dense(
    source: Checkpoint,
    hashes: dict[str, dict[str, str]],
    *,
    carried: list[str],
    left_behind: list[str],
) -> dict[str, Any]:
    """The provenance of a dense model that was trained on: nothing was built."""
    return {
        "format": FORMAT,
        "upcycle_version": upcycle.__version__,
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
        "source": {
            "name": source.name,
            "path": _place(source),
            "model_type": source.config["model_type"],
            "sha256": hashes[source.label],
            "donors": {},
        },
        "target": source.config["model_type"],
        "recipe": None,
        "blueprint_hash": None,
        "carried_files": carried,
        "left_behind_files": left_behind,
    }


def _place(opened: Checkpoint) -> str:
    """Where a checkpoint is. Whoever gets the folder does not learn whose home it was in."""
    folder, home = opened.folder.resolve(), _home()
    return f"~/{folder.relative_to(home)}" if home and folder.is_relative_to(home) else str(folder)


def _home() -> Path | None:
    try:
        home = Path.home().resolve()
    except RuntimeError:  # nobody's
        return None
    return home if home != home.parent else None


def source_of(made: dict[str, Any]) -> Path:
    """Where the source of a folder with this provenance was."""
    path = Path(str(made["source"]["path"]))
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def read(folder: Path) -> dict[str, Any]:
    """The provenance in a folder; an error where it has none."""
    found = read_json(
        folder / FILE, f"{folder} has no {FILE}; it was not made by `upcycle convert`, or lost its provenance"
    )
    if found.get("format") != FORMAT:
        raise UpcycleError(f"{folder / FILE} has format {found.get('format')}; this version reads {FORMAT}")
    if damaged := [key for key, sound in _PARTS.items() if not sound(found.get(key, ...))]:
        raise UpcycleError(f"{folder / FILE} is damaged: {listed(damaged)} in it is missing or no such thing")
    if (found["recipe"] is None) != (found["blueprint_hash"] is None):
        raise UpcycleError(f"{folder / FILE} is damaged: it has a recipe or a blueprint_hash, and not both")
    return found


def _is_source(value: Any) -> bool:
    return _is_hashed(value) and isinstance(value.get("donors"), dict) and _all(_is_hashed, value["donors"])


def _is_hashed(value: Any) -> bool:
    """A checkpoint with the hashes of its files."""
    if not isinstance(value, dict) or not isinstance(value.get("sha256"), dict):
        return False
    texts = [value[key] for key in ("name", "path", "model_type") if key in value]
    return all(isinstance(text, str) for text in [*texts, *value["sha256"].values()])


def _all(sound: Callable[[Any], bool], table: dict[str, Any]) -> bool:
    return all(map(sound, table.values()))


def _is_recipe(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    init = value.get("init")
    return isinstance(value.get("moe"), dict) and isinstance(init, dict) and isinstance(init.get("name"), str)


def _is_training(value: Any) -> bool:
    counts = ("step", "tokens")
    return isinstance(value, dict) and all(
        type(value.get(key)) in (int, float) and math.isfinite(value[key]) for key in counts
    )


def _is_names(value: Any) -> bool:
    return value is ... or (isinstance(value, list) and all(isinstance(name, str) for name in value))


_PARTS: dict[str, Callable[[Any], bool]] = {
    "source": _is_source,
    "recipe": _is_recipe,
    "blueprint_hash": lambda value: value is None or isinstance(value, str),
    "training": lambda value: value is ... or (isinstance(value, list) and all(map(_is_training, value))),
    "carried_files": _is_names,
    "left_behind_files": _is_names,
    "files": lambda value: (
        value is ...
        or (isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values()))
    ),
}
"""What must hold of each part; `...` stands for one that is not there."""
