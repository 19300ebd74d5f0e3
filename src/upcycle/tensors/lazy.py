"""Lazy tensors: a shape, the dense tensors it is made of, and how. Nothing is read until a slice is.

A lazy tensor is read as `t.read(index, dtype)`: `index` is one (start, stop) per dimension, and `dtype` is
the safetensors name of the wanted dtype. The tensors here only move values and keep their bits; arithmetic is
in `computed.py`. The value of a slice depends only on its place.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from upcycle.checkpoints.checkpoint import CHUNK, Checkpoint
from upcycle.checkpoints.dtypes import ITEMS, cast
from upcycle.checkpoints.header import TensorInfo

Index = tuple[tuple[int, int], ...]

_BLOCK = 1 << 20  # elements handled at once if a whole tensor would be too much
_RUN = 1 << 12  # bytes; shorter runs are read with what lies between them


@dataclass(frozen=True)
class Extent:
    """A range of bytes of a stored tensor."""

    checkpoint: Checkpoint
    info: TensorInfo
    start: int
    stop: int


class Lazy(abc.ABC):
    """A tensor that is computed or read on demand."""

    shape: tuple[int, ...]
    dtype: str  # of the stored tensors it comes from

    @abc.abstractmethod
    def read(self, index: Index, dtype: str) -> np.ndarray:
        """Return the slice `index` as a new array of `dtype`, [stop - start, ...]."""

    def into(self, index: Index, out: np.ndarray, dtype: str) -> None:
        """Write the slice `index`, in `dtype`, into `out`, which has its shape and that dtype.

        A subclass that only moves stored bytes reads them to their place; others go block by block.
        """
        for block in blocks(index):
            out[_within(block, index)] = self.read(block, dtype)

    @abc.abstractmethod
    def describe(self) -> Any:
        """Return a description as JSON; equal descriptions over equal sources mean equal tensors."""

    @abc.abstractmethod
    def sources(self) -> Iterator[TensorInfo]:
        """Yield the stored tensors that it reads."""

    def extents(self) -> list[Extent] | None:
        """Return the byte ranges that make it up, in order, or None if it is more than stored bytes."""
        return None

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def all(self, dtype: str | None = None) -> np.ndarray:
        """Return the whole tensor."""
        return self.read(tuple((0, n) for n in self.shape), dtype or self.dtype)


def blocks(index: Index, elements: int = _BLOCK) -> Iterator[Index]:
    """Cut `index` into pieces of about `elements`, contiguous and in row-major order."""
    if not index:
        yield index
        return
    (start, stop), *rest = index
    row = math.prod(b - a for a, b in rest)
    if row > elements and rest:
        for i in range(start, stop):
            for inner in blocks(tuple(rest), elements):
                yield ((i, i + 1), *inner)
    else:
        step = max(1, elements // max(1, row))
        for i in range(start, stop, step):
            yield ((i, min(stop, i + step)), *rest)


@dataclass(frozen=True, eq=False)
class Stored(Lazy):
    """A tensor of the checkpoint, unchanged."""

    checkpoint: Checkpoint
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.info.shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.info.dtype

    def read(self, index: Index, dtype: str) -> np.ndarray:
        item = ITEMS[self.dtype]
        if not index:
            return cast(self._rows(0, 1, (), item), dtype, self.info.name).reshape(())
        (start, stop), *rest = index
        rows = self._rows(start, stop, self.shape[1:], item)
        rows = rows[(slice(None), *(slice(a, b) for a, b in rest))]
        return cast(np.ascontiguousarray(rows), dtype, self.info.name)

    def into(self, index: Index, out: np.ndarray, dtype: str) -> None:
        if dtype != self.dtype or not index:
            super().into(index, out, dtype)
            return
        # An axis whose inner axes are wanted whole is one run of bytes.
        axis = len(index) - 1
        while axis and index[axis] == (0, self.shape[axis]):
            axis -= 1
        run = math.prod(b - a for a, b in index[axis:]) * out.itemsize
        if run < _RUN and axis:
            self._thin(index, out, dtype)
            return
        strides = [math.prod(self.shape[i + 1 :]) * out.itemsize for i in range(len(index))]
        for outer in itertools.product(*(range(b - a) for a, b in index[:axis])):
            start = index[axis][0] * strides[axis]
            start += sum((i + a) * s for i, (a, _), s in zip(outer, index, strides, strict=False))
            self._run(start, out[outer], run)

    def _run(self, start: int, out: np.ndarray, count: int) -> None:
        """Read `count` bytes from byte `start` into `out`, at once if it is one piece of memory."""
        if out.flags.c_contiguous:
            self.checkpoint.read_into(self.info, start, out.reshape(-1).view(np.uint8))
        else:
            found = self.checkpoint.pread(self.info, start, start + count)
            out[...] = found.view(out.dtype).reshape(out.shape)

    def _thin(self, index: Index, out: np.ndarray, dtype: str) -> None:
        """Read short runs with what lies between them, a few whole rows at a time."""
        (start, stop), *rest = index
        rows = max(1, CHUNK // (math.prod(self.shape[1:]) * out.itemsize))
        for i in range(start, stop, rows):
            j = min(stop, i + rows)
            out[i - start : j - start] = self.read(((i, j), *rest), dtype)

    def _rows(self, start: int, stop: int, inner: tuple[int, ...], item: np.dtype) -> np.ndarray:
        row = math.prod(inner) * item.itemsize
        return self.checkpoint.pread(self.info, start * row, stop * row).view(item).reshape(-1, *inner)

    def describe(self) -> Any:
        return [self.checkpoint.label, self.info.name]

    def sources(self) -> Iterator[TensorInfo]:
        yield self.info

    def extents(self) -> list[Extent]:
        return [Extent(self.checkpoint, self.info, 0, self.info.nbytes)]


@dataclass(frozen=True, eq=False)
class Changed(Lazy):
    """A tensor made of one other tensor, with its shape unless the subclass says otherwise. Abstract."""

    base: Lazy

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.base.dtype

    def sources(self) -> Iterator[TensorInfo]:
        return self.base.sources()


@dataclass(frozen=True, eq=False)
class Joined(Lazy):
    """A tensor made of several others, with their shape unless the subclass says otherwise. Abstract."""

    parts: tuple[Lazy, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.parts[0].shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.parts[0].dtype

    def sources(self) -> Iterator[TensorInfo]:
        for part in self.parts:
            yield from part.sources()


def _within(block: Index, index: Index) -> tuple[slice, ...]:
    """Return the place of a block of `index` in an array of the slice `index`."""
    return tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(block, index, strict=True))
