"""One safetensors file written tensor by tensor, so that one of them is in memory at a time.

It is written under another name and renamed when it is on disk: a file of this name is whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from upcycle.errors import UpcycleError

_ITEMS: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor that is to be written: its safetensors dtype, its shape, and what makes it."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _ITEMS[self.dtype].itemsize


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors`, in order, to `path`; a file that is there is replaced."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        table[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
    begun = path.with_name(path.name + ".writing")
    try:
        with begun.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                values = np.ascontiguousarray(tensor.make(), _ITEMS[tensor.dtype])
                assert values.shape == tensor.shape
                file.write(values.data)
            file.flush()
            os.fsync(file.fileno())
        begun.rename(path)
    finally:
        begun.unlink(missing_ok=True)


def read(path: Path, dtype: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """The tensor at byte `offset` of `path`, as a new array."""
    values = np.fromfile(path, _ITEMS[dtype], math.prod(shape), offset=offset)
    if values.size < math.prod(shape):
        raise UpcycleError(f"{path} ended while it was read; it has changed")
    return values.reshape(shape)
