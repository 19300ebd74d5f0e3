"""`upcycle.json`: what a folder was made from, how, and by what. Written by `convert`, read by the rest."""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any

import numpy as np

import upcycle
from upcycle.blueprints import Blueprint
from upcycle.checkpoint import Checkpoint, read_json
from upcycle.errors import UpcycleError

FILE = "upcycle.json"
FORMAT = 1


def record(
    built: Blueprint, hashes: dict[str, dict[str, str]], *, carried: list[str], left_behind: list[str]
) -> dict[str, Any]:
    """The provenance of a folder. It holds no time, so that a recipe run twice gives equal folders."""
    return {
        "format": FORMAT,
        "upcycle_version": upcycle.__version__,
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
        "source": {
            "name": built.source.name,
            "path": str(built.source.folder.resolve()),
            "model_type": built.dense.family.model_type,
            "sha256": hashes[built.source.label],
            "donors": {
                c.label: {"name": c.name, "path": str(c.folder.resolve()), "sha256": hashes[c.label]}
                for c in built.checkpoints[1:]
            },
        },
        "target": built.native.model_type,
        "recipe": built.recipe.as_table(),
        "blueprint_hash": built.hash,
        "preserves_function": built.preserves_function,
        "moe_layers": built.moe_layers,
        "left_out_tensors": dict(built.left_out),
        "left_out_config_keys": list(built.dense.unknown_keys),
        "carried_files": carried,
        "left_behind_files": left_behind,
    }


def of_dense(
    source: Checkpoint, hashes: dict[str, dict[str, str]], *, carried: list[str], left_behind: list[str]
) -> dict[str, Any]:
    """The provenance of a dense model that was trained on: nothing was built."""
    return {
        "format": FORMAT,
        "upcycle_version": upcycle.__version__,
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
        "source": {
            "name": source.name,
            "path": str(source.folder.resolve()),
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


def read(folder: Path) -> dict[str, Any]:
    """The provenance in a folder; an error where it has none."""
    found = read_json(
        folder / FILE, f"{folder} has no {FILE}; it was not made by `upcycle convert`, or lost its provenance"
    )
    if found.get("format") != FORMAT:
        raise UpcycleError(f"{folder / FILE} has format {found.get('format')}; this version reads {FORMAT}")
    source = found.get("source")
    parts = [source, *(source.get(k) for k in ("sha256", "donors") if type(source) is dict)]
    built: tuple[Any, ...] = (found.get("recipe"), found.get("blueprint_hash"))
    kinds = (dict, str)
    whole = built == (None, None) or all(isinstance(b, k) for b, k in zip(built, kinds, strict=True))
    if (
        not all(isinstance(part, dict) for part in parts)
        or not whole
        or not {"recipe", "blueprint_hash"} <= {*found}
    ):
        raise UpcycleError(f"{folder / FILE} is damaged: recipe, source or blueprint_hash is missing in it")
    if odd := _odd(found):
        raise UpcycleError(f"{folder / FILE} is damaged: {odd} is not as upcycle writes it")
    return found


def _odd(found: dict[str, Any]) -> str | None:
    """The first part of a provenance that is not what its readers count on."""
    source, recipe, trainings = found["source"], found["recipe"], found.get("training", [])
    named = all(isinstance(source.get(key, ""), str) for key in ("name", "path", "model_type"))
    if not named or not {"name", "path"} <= {*source}:
        return "source"
    if not all(isinstance(d, dict) and isinstance(d.get("sha256"), dict) for d in source["donors"].values()):
        return "source.donors"
    if recipe is not None and not all(isinstance(recipe.get(key), dict) for key in ("moe", "init")):
        return "recipe"
    if not isinstance(trainings, list) or not all(map(_is_training, trainings)):
        return "training"
    return None


def _is_training(entry: Any) -> bool:
    counts = ("step", "tokens")
    return isinstance(entry, dict) and all(
        type(entry.get(key)) in (int, float) and math.isfinite(entry[key]) for key in counts
    )
