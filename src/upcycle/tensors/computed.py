"""Lazy tensors whose values are computed: arithmetic on stored ones, constants, random numbers.

Arithmetic is in float32 and is cast once, at the end. Statistics are summed in float64. Random numbers come
from the stream that a key names; the place of an element decides its number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from upcycle.checkpoints.dtypes import FLOATS, cast, computing, refuse_infinite
from upcycle.checkpoints.header import TensorInfo
from upcycle.errors import listed
from upcycle.system.once import once
from upcycle.tensors import rng
from upcycle.tensors.lazy import Changed, Index, Joined, Lazy, blocks
from upcycle.tensors.positions import Order


@dataclass(frozen=True, eq=False)
class Affine(Changed):
    """scale x base + shift, in float32."""

    scale: float = 1.0
    shift: float = 0.0

    def read(self, index: Index, dtype: str) -> np.ndarray:
        base, name = self.base.read(index, "F32"), f"{_named(self)}, scaled,"
        with computing(name):
            values = base * np.float32(self.scale) + np.float32(self.shift)
        return cast(values, dtype, name)

    def describe(self) -> Any:
        return ["affine", self.scale, self.shift, self.base.describe()]


@dataclass(frozen=True, eq=False)
class UnitRows(Changed):
    """The rows of a matrix divided by their lengths; a row of zeros stays."""

    def read(self, index: Index, dtype: str) -> np.ndarray:
        rows, (start, stop) = index
        name = f"the unit rows of {_named(self)}"
        whole = self.base.read((rows, (0, self.shape[1])), "F32").astype(np.float64)
        lengths = np.sqrt(np.square(whole).sum(1, keepdims=True))
        with computing(name):
            values = (whole / np.where(lengths == 0, 1.0, lengths)).astype(np.float32)
        return cast(np.ascontiguousarray(values[:, start:stop]), dtype, name)

    def describe(self) -> Any:
        return ["unit rows", self.base.describe()]


@dataclass(frozen=True, eq=False)
class Mean(Joined):
    """The mean of `parts`, in float32."""

    def read(self, index: Index, dtype: str) -> np.ndarray:
        total, name = self.parts[0].read(index, "F32"), f"the mean of {_named(self)}"
        for part in self.parts[1:]:
            more = part.read(index, "F32")
            with computing(name):
                total += more
        return cast(total / np.float32(len(self.parts)), dtype, name)

    def describe(self) -> Any:
        return ["mean", *(p.describe() for p in self.parts)]


@dataclass(frozen=True, eq=False)
class Redraw(Changed):
    """A tensor equal to `base`, with the given positions along `axis` (0 or 1 of a matrix) drawn anew.

    The new values are N(mu, sigma^2) with the mean and the standard deviation (n - 1) of the values they
    replace, one pair for the whole part (Nakamura et al., ICLR 2025, section 3.3).
    """

    axis: int
    positions: Order  # sorted
    key: rng.Key

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
        """Return rows `start` to `stop` of the new values, which have `columns` columns."""
        name = f"{_named(self)}, drawn anew,"
        with computing(name):
            drawn = rng.normals(
                self.key, start * columns, stop * columns, mean=mean, std=std, dtype=FLOATS[dtype]
            )
        if math.isfinite(mean) and math.isfinite(std):
            refuse_infinite(drawn, np.zeros(()), dtype, name)
        return drawn.reshape(stop - start, columns)

    def _statistics(self) -> tuple[float, float]:
        """Return mean and standard deviation (n - 1) of the part that is replaced."""
        places = self.positions.values
        totals, squares = (sums[places] for sums in neuron_sums(self.base, self.axis))
        return _mean_std(totals.sum(), squares.sum(), len(places) * self.shape[1 - self.axis])

    def describe(self) -> Any:
        return ["redraw", self.axis, self.positions.describe(), list(self.key), self.base.describe()]


@once(maxsize=12)  # holds the matrices of a few layers, because all experts of a layer ask for them
def neuron_sums(matrix: Lazy, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and sum of squares of each neuron of a matrix; two of [I], float64.

    The neurons lie along `axis`.
    """
    totals, squares = np.zeros((2, matrix.shape[axis]))
    for index in blocks(tuple((0, n) for n in matrix.shape)):
        values = matrix.read(index, "F32").astype(np.float64)
        place = slice(*index[axis])
        totals[place] += values.sum(axis=1 - axis)
        squares[place] += np.square(values, out=values).sum(axis=1 - axis)
    return totals, squares


def _named(lazy: Lazy) -> str:
    """Return a short text that names the stored tensors that it is made of."""
    return listed(list(dict.fromkeys(info.name for info in lazy.sources())))


def _mean_std(total: float, squares: float, n: int) -> tuple[float, float]:
    variance = (squares - total * total / n) / (n - 1) if n > 1 else 0.0
    return float(total / n), math.sqrt(max(0.0, variance))


@dataclass(frozen=True, eq=False)
class Noise(Changed):
    """A tensor equal to `base` + sigma x N(0, 1) on a share of the positions along `axis`, in float32.

    If `relative` is true, sigma is in standard deviations of `base`.
    """

    axis: int
    sigma: float
    relative: bool
    positions: Order  # sorted
    key: rng.Key

    def read(self, index: Index, dtype: str) -> np.ndarray:
        (r0, r1), (c0, c1) = index
        columns = self.shape[1]
        values = self.base.read(index, "F32")
        noisy = np.zeros(self.shape[self.axis], bool)
        noisy[self.positions.values] = True
        mask = noisy[r0:r1, None] if self.axis == 0 else noisy[None, c0:c1]
        name, sigma = f"{_named(self)}, with noise,", self._sigma()
        with computing(name):
            drawn = rng.normals(self.key, r0 * columns, r1 * columns, std=sigma)
            np.add(values, drawn.reshape(-1, columns)[:, c0:c1], out=values, where=mask)
        return cast(values, dtype, name)

    def _sigma(self) -> float:
        if not self.relative:
            return self.sigma
        totals, squares = neuron_sums(self.base, self.axis)
        return self.sigma * _mean_std(totals.sum(), squares.sum(), self.base.size)[1]

    def describe(self) -> Any:
        where = self.positions.describe()
        return ["noise", self.axis, self.sigma, self.relative, where, list(self.key), self.base.describe()]


@dataclass(frozen=True, eq=False)
class Fill(Lazy):
    """A tensor with the same value everywhere."""

    shape: tuple[int, ...]
    dtype: str
    value: float

    def read(self, index: Index, dtype: str) -> np.ndarray:
        cast(np.array(self.value), dtype, "a constant")
        return np.full(tuple(b - a for a, b in index), self.value, FLOATS[dtype])

    def describe(self) -> Any:
        return ["fill", list(self.shape), self.value]

    def sources(self) -> Iterator[TensorInfo]:
        return iter(())


@dataclass(frozen=True, eq=False)
class Made(Lazy):
    """A small matrix that a function returns, float64 or float32, made once for each whole tensor.

    `about` must distinguish the outcome from every other over the same source, because it is what is hashed.
    """

    shape: tuple[int, int]
    dtype: str
    make: Callable[[], np.ndarray]
    about: Any

    def read(self, index: Index, dtype: str) -> np.ndarray:
        whole = self._values
        assert whole.shape == self.shape
        values = whole[tuple(slice(a, b) for a, b in index)].astype(np.float32)
        return cast(values, dtype, "a matrix made of statistics")

    @cached_property
    def _values(self) -> np.ndarray:
        return self.make()

    def describe(self) -> Any:
        return ["made", list(self.shape), self.about]

    def sources(self) -> Iterator[TensorInfo]:
        return iter(())


@dataclass(frozen=True, eq=False)
class Drawn(Lazy):
    """A matrix of random numbers with mean 0 and standard deviation `std`.

    An `orthogonal` one has orthogonal rows of equal norm (columns, if there are more rows than columns).
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
            q *= np.sign(np.diag(r))  # this sign makes the decomposition unique
            values = (q.T if rows < columns else q)[r0:r1] * math.sqrt(max(rows, columns))
        elif self.kind == "uniform":
            half = math.sqrt(3)
            values = rng.uniforms(self.key, r0 * columns, r1 * columns, low=-half, high=half)
        else:
            values = rng.normals(self.key, r0 * columns, r1 * columns)
        name = f"a matrix drawn with a standard deviation of {self.std:g}"
        with computing(name):
            scaled = (values.reshape(r1 - r0, columns)[:, c0:c1] * self.std).astype(np.float32)
        return cast(scaled, dtype, name)

    def describe(self) -> Any:
        return ["drawn", self.kind, list(self.shape), self.std, list(self.key)]

    def sources(self) -> Iterator[TensorInfo]:
        return iter(())
