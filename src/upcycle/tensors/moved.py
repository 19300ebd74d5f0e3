"""Lazy tensors that put the values of others in other places and keep their bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from upcycle.checkpoints.dtypes import FLOATS
from upcycle.tensors.lazy import Changed, Extent, Index, Joined, Lazy
from upcycle.tensors.positions import Positions


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
