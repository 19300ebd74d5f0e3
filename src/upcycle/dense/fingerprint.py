"""Hashes that identify a checkpoint, whatever it is called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from upcycle import families
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.header import TensorInfo

if TYPE_CHECKING:
    from upcycle.dense.source import Dense

_EDGE = 4096  # bytes at each end of a tensor that are read


def of(dense: Dense) -> dict[str, str]:
    """Return hashes that identify a checkpoint independently of its name.

    They are the SHA-256 of its config, of its tensors' names, shapes and dtypes, and of the bytes at both
    ends of each tensor. The last is missing for a checkpoint without files. A part of a multimodal model is
    identified by its own tensors under its own names, so that it is the same whether it is taken out or not.
    """
    stored = ((dense.place.known_as(t.name), t) for t in dense.checkpoint.tensors.values())
    infos = sorted(
        ((name, t) for name, t in stored if name is not None and t.name not in dense.left_out),
        key=lambda each: each[0],
    )
    silent = families.SILENT - {"rope_parameters"}
    known_by = dense.place.known_by(dense.config, dense.checkpoint.config)
    config = {key: value for key, value in known_by.items() if key not in silent}
    found = {
        "config": _hash(json.dumps(config, sort_keys=True, default=str).encode()),
        "tensors": _hash(json.dumps([[name, list(t.shape), t.dtype] for name, t in infos]).encode()),
    }
    if all(file.is_file() for file in dense.checkpoint.files):
        content = hashlib.sha256()
        _add_edges(content, dense.checkpoint, (info for _, info in infos))
        found["content"] = content.hexdigest()
    return found


def of_weights(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 of the tensors of any checkpoint: names, shapes, dtypes, bytes at both ends."""
    infos = [info for _, info in sorted(checkpoint.tensors.items())]
    content = hashlib.sha256(json.dumps([[i.name, list(i.shape), i.dtype] for i in infos]).encode())
    _add_edges(content, checkpoint, infos)
    return content.hexdigest()


def _add_edges(content: Any, checkpoint: Checkpoint, infos: Iterable[TensorInfo]) -> None:
    for info in infos:
        for start in (0, max(0, info.nbytes - _EDGE)):
            content.update(checkpoint.pread(info, start, min(info.nbytes, start + _EDGE)).data)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
