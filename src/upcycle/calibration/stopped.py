"""The partial file of an interrupted calibration: its sums and its arguments, stored next to the result.

It has a SHA-256 of the arguments, the position and the sums, so that a damaged file is refused. Files of
older versions have none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upcycle.calibration.observer import Observer
from upcycle.checkpoints import tensor_file
from upcycle.checkpoints.header import read_header, read_metadata
from upcycle.checkpoints.tensor_file import Tensor
from upcycle.errors import UpcycleError, listed
from upcycle.records.statistics import KEY, PARTIAL

_STATE = KEY + PARTIAL  # its key in the metadata
_KEYS = {"begun", "done", "tokens"}  # of the state, without its hash
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64", torch.int32: "I32"}


def save(path: Path, observer: Observer, provenance: Mapping[str, Any], done: int) -> None:
    """Write the sums after `done` examples. The earlier file stays until the new one is on disk."""
    tensors = {
        name: Tensor(_TYPES[total.dtype], tuple(total.shape), partial(_numpy, total))
        for name, total in observer.sums.items()
    }
    state = {"begun": provenance, "done": done, "tokens": observer.tokens}
    digest = _begun_hash(state)
    for name in sorted(observer.sums):
        _add(digest, name, _numpy(observer.sums[name]))
    state["sha256"] = digest.hexdigest()
    tensor_file.write(path, tensors, {_STATE: json.dumps(state)})


def _begun_hash(state: Mapping[str, Any]) -> hashlib._Hash:
    """Begin the SHA-256 of a partial file: of its state, without the hash itself."""
    told = {key: state[key] for key in _KEYS}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode())


def _add(digest: hashlib._Hash, name: str, sums: np.ndarray) -> None:
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(sums).data)


def _numpy(total: torch.Tensor) -> np.ndarray:
    out: np.ndarray = total.cpu().numpy()
    return out


def begun(path: Path, provenance: Mapping[str, Any]) -> int:
    """Return the number of examples done; 0 without a file.

    Raises `UpcycleError` if the pass was started with a different provenance.
    """
    if not path.exists():
        return 0
    state = _state(path)
    before = state["begun"]
    if different := [key for key in provenance if before.get(key) != provenance[key]]:
        raise UpcycleError(
            f"{path} was begun with another {listed(different)}; start again with what it was begun with, or "
            f"delete it"
        )
    done: int = state["done"]
    return done


def _state(path: Path) -> dict[str, Any]:
    """Read the state in the metadata of a partial file."""
    try:
        read_header(path)
        state: dict[str, Any] = json.loads(read_metadata(path)[_STATE])
        counts = [state["done"], *dict(state["tokens"]).values()]
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError
        if state.keys() - {"sha256"} != _KEYS or not isinstance(state["begun"], dict):
            raise ValueError
    except (UpcycleError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UpcycleError(
            f"{path} is not what a stopped calibration leaves; delete it to start anew"
        ) from None
    return state


def restore(path: Path, observer: Observer) -> None:
    """Load the saved sums into the observer. Raises `UpcycleError` if they are not as they were saved."""
    saved, state = read_header(path), _state(path)
    digest = _begun_hash(state)
    for name in sorted(observer.sums):
        total, info = observer.sums[name], saved.get(name)
        if info is None or (info.shape, info.dtype) != (tuple(total.shape), _TYPES[total.dtype]):
            raise UpcycleError(f"{path} lacks sums of {name}; delete it to start anew")
        sums = tensor_file.read(path, info.dtype, info.shape, info.offset)
        _add(digest, name, sums)
        total.copy_(torch.from_numpy(sums))
    if state.get("sha256") not in (None, digest.hexdigest()):
        raise UpcycleError(f"{path} is not as it was saved (its SHA-256 differs); delete it to start anew")
    observer.tokens.update(state["tokens"])
