"""A writer for one safetensors file that holds only one tensor at a time in memory.

The file is written under another name and renamed when it is on disk, so a file of this name is complete.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from upcycle.errors import UpcycleError
from upcycle.system import whole_file

_ITEMS: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: its safetensors dtype, its shape, and the function that makes it."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """The number of bytes in the file."""
        return math.prod(self.shape) * _ITEMS[self.dtype].itemsize


class Described(Protocol):
    """A tensor as a header describes it."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


def header(tensors: Mapping[str, Described], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """Return the bytes before the data of a safetensors file, and the offset at which each tensor ends.

    The offsets count from the beginning of the data.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    ends, end = [], 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        table[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        ends.append(end)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text, ends


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors`, in order, to `path`; an existing file is replaced."""
    with whole_file.filling(path) as file:
        file.write(header(tensors, metadata)[0])
        for tensor in tensors.values():
            values = np.ascontiguousarray(tensor.make(), _ITEMS[tensor.dtype])
            assert values.shape == tensor.shape
            file.write(values.data)


def read(path: Path, dtype: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """Return the tensor at byte `offset` of `path`, as a new array."""
    values = np.fromfile(path, _ITEMS[dtype], math.prod(shape), offset=offset)
    if values.size < math.prod(shape):
        raise UpcycleError(f"{path} ended while it was read; it has changed")
    return values.reshape(shape)
