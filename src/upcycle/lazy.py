"""Lazy tensors: a shape, the dense tensors it is made of, and how. Nothing is read until a slice is.

A lazy tensor is read as `t.read(index, dtype)`: `index` is one (start, stop) per dimension, `dtype`
the safetensors name of the type wanted. Arithmetic is float32 and is cast once, at the end; what only
moves keeps its bits. The value of a slice depends on nothing but its place.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from upcycle import rng
from upcycle.checkpoint import Checkpoint, TensorInfo
from upcycle.dtypes import FLOATS, cast

Index = tuple[tuple[int, int], ...]

_BLOCK = 1 << 20  # elements handled at once where a whole tensor would be too much


@dataclass(frozen=True)
class Extent:
    """A range of bytes of a stored tensor."""

    checkpoint: Checkpoint
    info: TensorInfo
    start: int
    stop: int


class Lazy(abc.ABC):
    """A tensor that is not there yet."""

    shape: tuple[int, ...]
    dtype: str  # of the stored tensors it comes from

    @abc.abstractmethod
    def read(self, index: Index, dtype: str) -> np.ndarray:
        """The slice `index`, in `dtype`, as a new array."""

    @abc.abstractmethod
    def describe(self) -> Any:
        """What this tensor is, as JSON: equal descriptions over equal sources are equal tensors."""

    @abc.abstractmethod
    def sources(self) -> Iterator[TensorInfo]:
        """The stored tensors it reads."""

    def extents(self) -> list[Extent] | None:
        """The byte ranges that make it up, in order, where it is nothing but stored bytes."""
        return None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def all(self, dtype: str | None = None) -> np.ndarray:
        """The whole tensor."""
        return self.read(tuple((0, n) for n in self.shape), dtype or self.dtype)


def blocks(index: Index, elements: int = _BLOCK) -> Iterator[Index]:
    """Cut `index` into pieces of about `elements`, contiguous and in row-major order."""
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
    """A tensor of the checkpoint, as it is."""

    checkpoint: Checkpoint
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.info.shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.info.dtype

    def read(self, index: Index, dtype: str) -> np.ndarray:
        item = FLOATS[self.dtype]
        if not index:
            return cast(self._rows(0, 1, (), item), dtype, self.info.name).reshape(())
        (start, stop), *rest = index
        rows = self._rows(start, stop, self.shape[1:], item)
        rows = rows[(slice(None), *(slice(a, b) for a, b in rest))]
        return cast(np.ascontiguousarray(rows), dtype, self.info.name)

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
class Slice(Lazy):
    """Positions `start` to `stop` of `base` along `axis`."""

    base: Lazy
    axis: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return _with(self.base.shape, self.axis, self.stop - self.start)

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.base.dtype

    def read(self, index: Index, dtype: str) -> np.ndarray:
        a, b = index[self.axis]
        return self.base.read(_with(index, self.axis, (a + self.start, b + self.start)), dtype)

    def describe(self) -> Any:
        return ["slice", self.axis, self.start, self.stop, self.base.describe()]

    def sources(self) -> Iterator[TensorInfo]:
        return self.base.sources()

    def extents(self) -> list[Extent] | None:
        whole = self.base.extents()
        if self.axis != 0 or not whole or len(whole) != 1:
            return None
        (only,) = whole
        row = (only.stop - only.start) // self.base.shape[0]
        return [
            Extent(only.checkpoint, only.info, only.start + self.start * row, only.start + self.stop * row)
        ]


@dataclass(frozen=True)
class Order:
    """Which positions to take: places `start` to `stop` of the random order of range(n) that `key` names."""

    key: rng.Key
    n: int
    start: int
    stop: int
    sort: bool = False

    @property
    def values(self) -> np.ndarray:
        chosen = rng.permutation(self.key, self.n)[self.start : self.stop]
        return np.sort(chosen) if self.sort else chosen

    def __len__(self) -> int:
        return self.stop - self.start

    def describe(self) -> Any:
        return ["order", f"{self.key[0]:016x}{self.key[1]:016x}", self.n, self.start, self.stop, self.sort]


@dataclass(frozen=True)
class Given:
    """Which positions to take: a list that the recipe or a file gives."""

    positions: tuple[int, ...]

    @property
    def values(self) -> np.ndarray:
        return np.array(self.positions, np.int64)

    def __len__(self) -> int:
        return len(self.positions)

    def describe(self) -> Any:
        return list(self.positions)


@dataclass(frozen=True, eq=False)
class Computed:
    """Which positions to take: `length` of them, found out from the weights when first needed.

    `name` must tell the outcome apart from every other over the same `base`; it is what is hashed.
    """

    compute: Callable[[], np.ndarray]
    length: int
    name: Any

    @property
    def values(self) -> np.ndarray:
        return self.compute()

    def __len__(self) -> int:
        return self.length

    def describe(self) -> Any:
        return self.name


Positions = Order | Given | Computed


@dataclass(frozen=True, eq=False)
class Take(Lazy):
    """The given positions of `base` along `axis`, in the given order."""

    base: Lazy
    axis: int
    positions: Positions

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return _with(self.base.shape, self.axis, len(self.positions))

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.base.dtype

    def read(self, index: Index, dtype: str) -> np.ndarray:
        a, b = index[self.axis]
        wanted = self.positions.values[a:b]
        if self.axis > 0:  # rows are cheap to read whole, columns are not there to be read alone
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

    def sources(self) -> Iterator[TensorInfo]:
        return self.base.sources()


@dataclass(frozen=True, eq=False)
class Concat(Lazy):
    """`parts` one after another along `axis`."""

    parts: tuple[Lazy, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return _with(self.parts[0].shape, self.axis, sum(p.shape[self.axis] for p in self.parts))

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.parts[0].dtype

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

    def describe(self) -> Any:
        return ["concat", self.axis, *(p.describe() for p in self.parts)]

    def sources(self) -> Iterator[TensorInfo]:
        for part in self.parts:
            yield from part.sources()

    def extents(self) -> list[Extent] | None:
        return _joined(self.parts) if self.axis == 0 else None


@dataclass(frozen=True, eq=False)
class Stack(Lazy):
    """`parts` of one shape along a new first dimension: [E, ...]."""

    parts: tuple[Lazy, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.parts[0].dtype

    def read(self, index: Index, dtype: str) -> np.ndarray:
        (start, stop), *rest = index
        return np.stack([part.read(tuple(rest), dtype) for part in self.parts[start:stop]])

    def describe(self) -> Any:
        return ["stack", *(p.describe() for p in self.parts)]

    def sources(self) -> Iterator[TensorInfo]:
        for part in self.parts:
            yield from part.sources()

    def extents(self) -> list[Extent] | None:
        return _joined(self.parts)


@dataclass(frozen=True, eq=False)
class Pick(Lazy):
    """Entry `place` of `base` along the first dimension, which goes away."""

    base: Lazy
    place: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.shape[1:]

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.base.dtype

    def read(self, index: Index, dtype: str) -> np.ndarray:
        return self.base.read(((self.place, self.place + 1), *index), dtype)[0]

    def describe(self) -> Any:
        return ["pick", self.place, self.base.describe()]

    def sources(self) -> Iterator[TensorInfo]:
        return self.base.sources()


@dataclass(frozen=True, eq=False)
class Affine(Lazy):
    """scale x base + shift, in float32."""

    base: Lazy
    scale: float = 1.0
    shift: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.base.dtype

    def read(self, index: Index, dtype: str) -> np.ndarray:
        values = self.base.read(index, "F32") * np.float32(self.scale) + np.float32(self.shift)
        return cast(values, dtype, str(self.describe()))

    def describe(self) -> Any:
        return ["affine", self.scale, self.shift, self.base.describe()]

    def sources(self) -> Iterator[TensorInfo]:
        return self.base.sources()


@dataclass(frozen=True, eq=False)
class Mean(Lazy):
    """The mean of `parts`, in float32."""

    parts: tuple[Lazy, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.parts[0].shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.parts[0].dtype

    def read(self, index: Index, dtype: str) -> np.ndarray:
        total = self.parts[0].read(index, "F32")
        for part in self.parts[1:]:
            total += part.read(index, "F32")
        return cast(total / np.float32(len(self.parts)), dtype, str(self.describe()))

    def describe(self) -> Any:
        return ["mean", *(p.describe() for p in self.parts)]

    def sources(self) -> Iterator[TensorInfo]:
        for part in self.parts:
            yield from part.sources()


@dataclass(frozen=True, eq=False)
class Redraw(Lazy):
    """`base` with the given positions along `axis` (0 or 1 of a matrix) drawn anew.

    The new values are N(mu, sigma^2) with the mean and the standard deviation (n - 1) of the values they
    replace, one pair for the whole part (Nakamura et al., ICLR 2025, section 3.3).
    """

    base: Lazy
    axis: int
    positions: Order  # sorted
    key: rng.Key

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.base.dtype

    def read(self, index: Index, dtype: str) -> np.ndarray:
        out = self.base.read(index, dtype)
        places = self.positions.values
        (r0, r1), (c0, c1) = index
        mean, std = self._statistics()
        if self.axis == 0:
            i, j = (int(n) for n in np.searchsorted(places, (r0, r1)))
            drawn = self._drawn(i, j, self.shape[1], mean, std, dtype)
            out[places[i:j] - r0] = drawn[:, c0:c1]
        else:
            i, j = (int(n) for n in np.searchsorted(places, (c0, c1)))
            drawn = self._drawn(r0, r1, len(places), mean, std, dtype)
            out[:, places[i:j] - c0] = drawn[:, i:j]
        return out

    def _drawn(self, start: int, stop: int, columns: int, mean: float, std: float, dtype: str) -> np.ndarray:
        """Rows `start` to `stop` of the new values, which have `columns` columns."""
        drawn = rng.normals(
            self.key, start * columns, stop * columns, mean=mean, std=std, dtype=FLOATS[dtype]
        )
        return drawn.reshape(stop - start, columns)

    def _statistics(self) -> tuple[float, float]:
        """Mean and standard deviation (n - 1) of the part that is replaced."""
        places = self.positions.values
        totals, squares = (sums[places] for sums in neuron_sums(self.base, self.axis))
        return _mean_std(totals.sum(), squares.sum(), len(places) * self.shape[1 - self.axis])

    def describe(self) -> Any:
        return ["redraw", self.axis, self.positions.describe(), list(self.key), self.base.describe()]

    def sources(self) -> Iterator[TensorInfo]:
        return self.base.sources()


@lru_cache(maxsize=12)  # the matrices of a few layers: their experts all ask for them
def neuron_sums(matrix: Lazy, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum and sum of squares in float64 of each neuron of a matrix, neurons along `axis`; two of [I]."""
    totals, squares = np.zeros((2, matrix.shape[axis]))
    for index in blocks(tuple((0, n) for n in matrix.shape)):
        values = matrix.read(index, "F32").astype(np.float64)
        place = slice(*index[axis])
        totals[place] += values.sum(axis=1 - axis)
        squares[place] += np.square(values, out=values).sum(axis=1 - axis)
    return totals, squares


def _mean_std(total: float, squares: float, n: int) -> tuple[float, float]:
    variance = (squares - total * total / n) / (n - 1) if n > 1 else 0.0
    return float(total / n), math.sqrt(max(0.0, variance))


@dataclass(frozen=True, eq=False)
class Noise(Lazy):
    """`base` + sigma x N(0, 1), on a share of the positions along `axis`, in float32.

    `relative` measures sigma in standard deviations of `base`.
    """

    base: Lazy
    axis: int
    sigma: float
    relative: bool
    positions: Order  # sorted
    key: rng.Key

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.base.dtype

    def read(self, index: Index, dtype: str) -> np.ndarray:
        (r0, r1), (c0, c1) = index
        columns = self.shape[1]
        values = self.base.read(index, "F32")
        noisy = np.zeros(self.shape[self.axis], bool)
        noisy[self.positions.values] = True
        mask = noisy[r0:r1, None] if self.axis == 0 else noisy[None, c0:c1]
        drawn = rng.normals(self.key, r0 * columns, r1 * columns, std=self._sigma())
        np.add(values, drawn.reshape(-1, columns)[:, c0:c1], out=values, where=mask)
        return cast(values, dtype, "a value with noise")

    def _sigma(self) -> float:
        if not self.relative:
            return self.sigma
        totals, squares = neuron_sums(self.base, self.axis)
        return self.sigma * _mean_std(totals.sum(), squares.sum(), self.base.size)[1]

    def describe(self) -> Any:
        where = self.positions.describe()
        return ["noise", self.axis, self.sigma, self.relative, where, list(self.key), self.base.describe()]

    def sources(self) -> Iterator[TensorInfo]:
        return self.base.sources()


@dataclass(frozen=True, eq=False)
class Fill(Lazy):
    """One value everywhere."""

    shape: tuple[int, ...]
    dtype: str
    value: float

    def read(self, index: Index, dtype: str) -> np.ndarray:
        return np.full(tuple(b - a for a, b in index), self.value, FLOATS[dtype])

    def describe(self) -> Any:
        return ["fill", list(self.shape), self.value]

    def sources(self) -> Iterator[TensorInfo]:
        return iter(())


@dataclass(frozen=True, eq=False)
class Drawn(Lazy):
    """A matrix of random numbers with mean 0 and standard deviation `std`.

    `orthogonal` has orthogonal rows of equal norm (columns, where there are more rows than columns).
    """

    shape: tuple[int, int]
    dtype: str
    kind: Literal["normal", "uniform", "orthogonal"]
    std: float
    key: rng.Key

    def read(self, index: Index, dtype: str) -> np.ndarray:
        rows, columns = self.shape
        (r0, r1), (c0, c1) = index
        if self.kind == "orthogonal":
            drawn = rng.normals(self.key, 0, rows * columns).astype(np.float64).reshape(rows, columns)
            tall = drawn.T if rows < columns else drawn
            q, r = np.linalg.qr(tall)
            q *= np.sign(np.diag(r))  # the sign that makes the decomposition unique
            values = (q.T if rows < columns else q)[r0:r1] * math.sqrt(max(rows, columns))
        elif self.kind == "uniform":
            half = math.sqrt(3)
            values = rng.uniforms(self.key, r0 * columns, r1 * columns, low=-half, high=half)
        else:
            values = rng.normals(self.key, r0 * columns, r1 * columns)
        return cast(
            (values.reshape(r1 - r0, columns)[:, c0:c1] * self.std).astype(np.float32),
            dtype,
            "a router weight",
        )

    def describe(self) -> Any:
        return ["drawn", self.kind, list(self.shape), self.std, list(self.key)]

    def sources(self) -> Iterator[TensorInfo]:
        return iter(())


def _with(items: Sequence[Any], place: int, item: Any) -> tuple[Any, ...]:
    return (*items[:place], item, *items[place + 1 :])


def _joined(parts: Sequence[Lazy]) -> list[Extent] | None:
    out: list[Extent] = []
    for part in parts:
        extents = part.extents()
        if extents is None:
            return None
        out += extents
    return out
