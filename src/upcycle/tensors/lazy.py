"""Lazy tensors: a shape, the dense tensors it is made of, and how. Nothing is read until a slice is.

A lazy tensor is read as `t.read(index, dtype)`: `index` is one (start, stop) per dimension, and `dtype` is
the safetensors name of the wanted dtype. The tensors here only move values and keep their bits; arithmetic is
in `computed.py`. The value of a slice depends only on its place.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from upcycle.checkpoints.checkpoint import CHUNK, Checkpoint, TensorInfo
from upcycle.checkpoints.dtypes import FLOATS, ITEMS, cast
from upcycle.tensors.positions import Positions

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
        """Return the slice `index`, in `dtype`, as a new array."""

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


@dataclass(frozen=True, eq=False)
class Slice(Changed):
    """Positions `start` to `stop` of `base` along `axis`."""

    axis: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return _with(self.base.shape, self.axis, self.stop - self.start)

    def read(self, index: Index, dtype: str) -> np.ndarray:
        a, b = index[self.axis]
        return self.base.read(_with(index, self.axis, (a + self.start, b + self.start)), dtype)

    def into(self, index: Index, out: np.ndarray, dtype: str) -> None:
        a, b = index[self.axis]
        self.base.into(_with(index, self.axis, (a + self.start, b + self.start)), out, dtype)

    def describe(self) -> Any:
        return ["slice", self.axis, self.start, self.stop, self.base.describe()]

    def extents(self) -> list[Extent] | None:
        whole = self.base.extents()
        if self.axis != 0 or not whole or len(whole) != 1:
            return None
        (only,) = whole
        row = (only.stop - only.start) // self.base.shape[0]
        return [
            Extent(only.checkpoint, only.info, only.start + self.start * row, only.start + self.stop * row)
        ]


@dataclass(frozen=True, eq=False)
class Take(Changed):
    """The given positions of `base` along `axis`, in the given order."""

    axis: int
    positions: Positions

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return _with(self.base.shape, self.axis, len(self.positions))

    def read(self, index: Index, dtype: str) -> np.ndarray:
        a, b = index[self.axis]
        wanted = self.positions.values[a:b]
        if self.axis > 0:  # rows can be read alone, columns cannot, so whole rows are read
            whole = self.base.read(_with(index, self.axis, (0, self.base.shape[self.axis])), dtype)
            return np.ascontiguousarray(np.take(whole, wanted, axis=self.axis))
        out = np.empty(tuple(stop - start for start, stop in index), FLOATS[dtype])
        cuts = [0, *(np.flatnonzero(np.diff(wanted) != 1) + 1).tolist(), len(wanted)]
        for i, j in itertools.pairwise(cuts):
            if i < j:
                out[i:j] = self.base.read(((int(wanted[i]), int(wanted[j - 1]) + 1), *index[1:]), dtype)
        return out

    def describe(self) -> Any:
        return ["take", self.axis, self.positions.describe(), self.base.describe()]


@dataclass(frozen=True, eq=False)
class Concat(Joined):
    """`parts` one after another along `axis`."""

    axis: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return _with(self.parts[0].shape, self.axis, sum(p.shape[self.axis] for p in self.parts))

    def read(self, index: Index, dtype: str) -> np.ndarray:
        start, stop = index[self.axis]
        pieces, first = [], 0
        for part in self.parts:
            length = part.shape[self.axis]
            a, b = max(start, first) - first, min(stop, first + length) - first
            if a < b:
                pieces.append(part.read(_with(index, self.axis, (a, b)), dtype))
            first += length
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.axis)

    def into(self, index: Index, out: np.ndarray, dtype: str) -> None:
        start, stop = index[self.axis]
        first = 0
        for part in self.parts:
            length = part.shape[self.axis]
            a, b = max(start, first), min(stop, first + length)
            if a < b:
                place = (*[slice(None)] * self.axis, slice(a - start, b - start))
                part.into(_with(index, self.axis, (a - first, b - first)), out[place], dtype)
            first += length

    def describe(self) -> Any:
        return ["concat", self.axis, *(p.describe() for p in self.parts)]

    def extents(self) -> list[Extent] | None:
        return _joined(self.parts) if self.axis == 0 else None


@dataclass(frozen=True, eq=False)
class Stack(Joined):
    """`parts` of one shape along a new first dimension: [E, ...]."""

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.parts), *self.parts[0].shape)

    def read(self, index: Index, dtype: str) -> np.ndarray:
        (start, stop), *rest = index
        out = np.empty(tuple(b - a for a, b in index), FLOATS[dtype])
        for place, part in enumerate(self.parts[start:stop]):
            out[place] = part.read(tuple(rest), dtype)
        return out

    def into(self, index: Index, out: np.ndarray, dtype: str) -> None:
        (start, stop), *rest = index
        for place, part in enumerate(self.parts[start:stop]):
            part.into(tuple(rest), out[place], dtype)

    def describe(self) -> Any:
        return ["stack", *(p.describe() for p in self.parts)]

    def extents(self) -> list[Extent] | None:
        return _joined(self.parts)


@dataclass(frozen=True, eq=False)
class Pick(Changed):
    """Entry `place` of `base` along the first dimension, which is removed."""

    place: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.shape[1:]

    def read(self, index: Index, dtype: str) -> np.ndarray:
        return self.base.read(((self.place, self.place + 1), *index), dtype)[0]

    def into(self, index: Index, out: np.ndarray, dtype: str) -> None:
        self.base.into(((self.place, self.place + 1), *index), out[None], dtype)

    def describe(self) -> Any:
        return ["pick", self.place, self.base.describe()]


@dataclass(frozen=True, eq=False)
class Transposed(Changed):
    """`base` with its last two axes exchanged."""

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return _exchanged(self.base.shape)

    def read(self, index: Index, dtype: str) -> np.ndarray:
        return np.ascontiguousarray(np.swapaxes(self.base.read(_exchanged(index), dtype), -1, -2))

    def describe(self) -> Any:
        return ["transposed", self.base.describe()]


@dataclass(frozen=True, eq=False)
class Folded(Changed):
    """A matrix [N, M] viewed as [N, *inner], for a convolution's kernels."""

    inner: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.base.shape[0], *self.inner)

    def read(self, index: Index, dtype: str) -> np.ndarray:
        rows, *rest = index
        whole = self.base.read((rows, (0, self.base.shape[1])), dtype).reshape(-1, *self.inner)
        return np.ascontiguousarray(whole[(slice(None), *(slice(a, b) for a, b in rest))])

    def describe(self) -> Any:
        return ["folded", list(self.inner), self.base.describe()]


def _within(block: Index, index: Index) -> tuple[slice, ...]:
    """Return the place of a block of `index` in an array of the slice `index`."""
    return tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(block, index, strict=True))


def _with(items: Sequence[Any], place: int, item: Any) -> tuple[Any, ...]:
    return (*items[:place], item, *items[place + 1 :])


def _exchanged(items: Sequence[Any]) -> tuple[Any, ...]:
    return (*items[:-2], items[-1], items[-2])


def _joined(parts: Sequence[Lazy]) -> list[Extent] | None:
    """Return the byte ranges of parts one after another; None if they are not bytes of one dtype."""
    if len({part.dtype for part in parts}) > 1:
        return None
    out: list[Extent] = []
    for part in parts:
        extents = part.extents()
        if extents is None:
            return None
        out += extents
    return out
