"""The source of a run from scratch: a config without weights, whose tensors have shapes but no values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from upcycle import families
from upcycle.checkpoints.checkpoint import INDEX, WEIGHTS, Checkpoint, read_json
from upcycle.checkpoints.header import TensorInfo
from upcycle.checkpoints.hub import is_id
from upcycle.errors import UpcycleError

_CONFIG = "config.json"


class Weightless(Checkpoint):
    """A checkpoint whose tensors cannot be read."""

    def pread(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        raise UpcycleError(f"{self.folder} has a config and no weights, and {info.name} is asked for")


def opened(source: str | Path) -> Checkpoint | None:
    """Open the folder `source` if it has a config and no weights; return None otherwise."""
    folder = Path(source)
    if is_id(source) or (folder / INDEX).exists() or (folder / WEIGHTS).exists():
        return None
    if not (folder / _CONFIG).is_file():
        return None
    raw = read_json(folder / _CONFIG, "")
    if not isinstance(raw.get("model_type"), str) or raw["model_type"] not in families.names():
        return None
    family = families.find(raw["model_type"])
    shapes = family.shapes(family.config(raw))
    return Weightless(folder, raw, {name: _described(folder, name, shape) for name, shape in shapes.items()})


def _described(folder: Path, name: str, shape: Any) -> TensorInfo:
    """Return a float32 tensor of this shape; its file is the config."""
    return TensorInfo(
        name=name,
        dtype="F32",
        shape=tuple(shape),
        file=folder / _CONFIG,
        offset=0,
        nbytes=4 * math.prod(shape),
    )
