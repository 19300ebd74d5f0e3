"""Hashes that identify a checkpoint, whatever it is called."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from upcycle import families

if TYPE_CHECKING:
    from upcycle.dense.source import Dense

_EDGE = 4096  # bytes at each end of a tensor that are read


def of(dense: Dense) -> dict[str, str]:
    """Return hashes that identify a checkpoint independently of its name.

    They are the SHA-256 of its config, of its tensors' names, shapes and dtypes, and of the bytes at both
    ends of each tensor. The last is missing for a checkpoint without files.
    """
    infos = [t for name, t in sorted(dense.checkpoint.tensors.items()) if name not in dense.left_out]
    silent = families.SILENT - {"rope_parameters"}
    config = {key: value for key, value in dense.config.items() if key not in silent}
    found = {
        "config": _hash(json.dumps(config, sort_keys=True, default=str).encode()),
        "tensors": _hash(json.dumps([[t.name, list(t.shape), t.dtype] for t in infos]).encode()),
    }
    if all(file.is_file() for file in dense.checkpoint.files):
        content = hashlib.sha256()
        for info in infos:
            for start in (0, max(0, info.nbytes - _EDGE)):
                content.update(dense.checkpoint.pread(info, start, min(info.nbytes, start + _EDGE)).data)
        found["content"] = content.hexdigest()
    return found


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
