"""The partial file of an interrupted calibration: its sums and its arguments, stored next to the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upcycle.calibration.observer import Observer
from upcycle.checkpoints import tensor_file
from upcycle.checkpoints.checkpoint import read_header, read_metadata
from upcycle.checkpoints.tensor_file import Tensor
from upcycle.dense.statistics import KEY, PARTIAL
from upcycle.errors import UpcycleError, listed

_STATE = KEY + PARTIAL  # its key in the metadata
_TYPES = {torch.float64: "F64", torch.int64: "I64", torch.int32: "I32"}


def save(path: Path, observer: Observer, provenance: Mapping[str, Any], done: int) -> None:
    """Write the sums after `done` examples. The earlier file stays until the new one is on disk."""
    tensors = {
        name: Tensor(_TYPES[total.dtype], tuple(total.shape), partial(_numpy, total))
        for name, total in observer.sums.items()
    }
    state = {"begun": provenance, "done": done, "tokens": observer.tokens}
    tensor_file.write(path, tensors, {_STATE: json.dumps(state)})


def _numpy(total: torch.Tensor) -> np.ndarray:
    out: np.ndarray = total.cpu().numpy()
    return out


def begun(path: Path, provenance: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """Return the number of examples done and the tokens of each stack; 0 and {} without a file.

    Raises `UpcycleError` if the pass was started with a different provenance.
    """
    if not path.exists():
        return 0, {}
    try:
        read_header(path)
        state = json.loads(read_metadata(path)[_STATE])
        before, done, tokens = dict(state["begun"]), state["done"], dict(state["tokens"])
        if any(type(count) is not int or count < 0 for count in (done, *tokens.values())):
            raise ValueError
    except (UpcycleError, OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UpcycleError(
            f"{path} is not what a stopped calibration leaves; delete it to start anew"
        ) from None
    if different := [key for key in provenance if before.get(key) != provenance[key]]:
        raise UpcycleError(
            f"{path} was begun with another {listed(different)}; start again with what it was begun with, or "
            f"delete it"
        )
    return done, tokens


def restore(path: Path, observer: Observer, tokens: Mapping[str, int]) -> None:
    """Load the saved sums into the observer."""
    saved = read_header(path)
    for name, total in observer.sums.items():
        info = saved.get(name)
        if info is None or (info.shape, info.dtype) != (tuple(total.shape), _TYPES[total.dtype]):
            raise UpcycleError(f"{path} lacks sums of {name}; delete it to start anew")
        total.copy_(torch.from_numpy(tensor_file.read(path, info.dtype, info.shape, info.offset)))
    observer.tokens.update(tokens)
