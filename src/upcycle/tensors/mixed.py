"""Lazy tensors that mix others: a low-rank change (LoRA), and two or more tensors along a line or an arc.

As in `computed.py`, the value of an element depends on its place alone. So there is no matrix product here,
because the order of its sums is that of a library: sums are in float64, term by term, and are cast once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from upcycle.checkpoints.dtypes import cast, computing
from upcycle.checkpoints.header import TensorInfo
from upcycle.errors import listed
from upcycle.system.once import once
from upcycle.tensors.lazy import Changed, Index, Joined, Lazy, blocks

_TILE = 1 << 15  # elements of a product that are added up at once; three of them fit a processor's cache
_PARALLEL = 0.9995  # the cosine above which an arc is taken for a line, as in mergekit's slerp


@dataclass(frozen=True, eq=False)
class LowRank(Changed):
    """base + scale x left right, with base [N, M], left [N, r] and right [r, M] (LoRA, arXiv 2106.09685).

    The r terms of an element are added in float64 in their order; base is added, and the sum is cast once.
    """

    left: Lazy
    right: Lazy
    scale: float

    def read(self, index: Index, dtype: str) -> np.ndarray:
        rows, columns = index
        rank = (0, self.right.shape[0])
        left = self.left.read((rows, rank), "F64") * self.scale
        right = self.right.read((rank, columns), "F64")
        out = self.base.read(index, "F64")
        for (r0, r1), (c0, c1) in blocks(tuple((0, n) for n in out.shape), _TILE):
            total = np.zeros((r1 - r0, c1 - c0))
            term = np.empty_like(total)
            for k in range(rank[1]):
                np.multiply(left[r0:r1, k, None], right[None, k, c0:c1], out=term)
                total += term
            out[r0:r1, c0:c1] += total
        return _rounded(out, dtype, f"{_named(self)}, merged,")

    def describe(self) -> Any:
        parts = (self.base, self.left, self.right)
        return ["low rank", self.scale, *(part.describe() for part in parts)]

    def sources(self) -> Iterator[TensorInfo]:
        for part in (self.base, self.left, self.right):
            yield from part.sources()


@dataclass(frozen=True, eq=False)
class Lerp(Joined):
    """(1 - share) x first + share x second, of two tensors, in float64."""

    share: float

    def read(self, index: Index, dtype: str) -> np.ndarray:
        return _sum(self, (1.0 - self.share, self.share), index, dtype)

    def describe(self) -> Any:
        return ["lerp", self.share, *(part.describe() for part in self.parts)]


@dataclass(frozen=True, eq=False)
class Slerp(Joined):
    """Tensors mixed along the arcs between them (spherical interpolation), each as one long vector.

    `shares` has the place on the arc between what is mixed so far and the next tensor: 0.5 for two tensors
    means the middle. The angle is that between the tensors; their lengths are mixed as they are. If a cosine
    is above 0.9995, the arc is a line. Products of whole tensors are summed in float64.
    """

    shares: tuple[float, ...]

    def read(self, index: Index, dtype: str) -> np.ndarray:
        return _sum(self, self._factors(), index, dtype)

    def _factors(self) -> tuple[float, ...]:
        """Return the factor of each tensor, which the products of all pairs decide on."""
        products = _products(self.parts)
        factors = [1.0]
        for place, share in enumerate(self.shares, start=1):
            each = list(enumerate(factors))
            product = math.fsum(f * products[i, place] for i, f in each)
            square = math.fsum(f * g * products[i, j] for i, f in each for j, g in each)
            length, other = math.sqrt(max(0.0, square)), math.sqrt(products[place, place])
            kept, added = _on_arc(product, length, other, share)
            factors = [*(f * kept for f in factors), added]
        # The last bits of sine and arc cosine are those of a machine's library.
        return tuple(float(np.float32(f)) for f in factors)

    def describe(self) -> Any:
        return ["slerp", list(self.shares), *(part.describe() for part in self.parts)]


def _on_arc(product: float, length: float, other: float, share: float) -> tuple[float, float]:
    """Return the factors of two vectors with this product and these lengths, for a place on their arc."""
    cosine = product / (length * other) if length and other else 1.0
    if abs(cosine) > _PARALLEL:
        return 1.0 - share, share
    angle = math.acos(cosine)
    return math.sin((1.0 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)


@once(maxsize=64)  # numbers alone; every piece of a tensor asks for them
def _products(parts: tuple[Lazy, ...]) -> Mapping[tuple[int, int], float]:
    """Return the inner products of all pairs of tensors, by their places."""
    pairs = list(combinations_with_replacement(range(len(parts)), 2))
    sums: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
    for index in blocks(tuple((0, n) for n in parts[0].shape)):
        read = [part.read(index, "F64") for part in parts]
        for i, j in pairs:
            sums[i, j].append(_total(read[i] * read[j]))
    found = {pair: math.fsum(each) for pair, each in sums.items()}
    return found | {(j, i): value for (i, j), value in found.items()}


def _total(values: np.ndarray) -> float:
    """Return the sum of an array in an order that no library decides on: halves added to halves."""
    flat = values.reshape(-1)
    while flat.size > 1:
        half = (flat.size + 1) // 2
        folded = flat[:half].copy()
        folded[: flat.size - half] += flat[half:]
        flat = folded
    return float(flat[0]) if flat.size else 0.0


def _sum(joined: Joined, factors: tuple[float, ...], index: Index, dtype: str) -> np.ndarray:
    """Return the sum of the parts, each by its factor, in float64."""
    out = joined.parts[0].read(index, "F64") * factors[0]
    for part, factor in zip(joined.parts[1:], factors[1:], strict=True):
        out += part.read(index, "F64") * factor
    return _rounded(out, dtype, f"{_named(joined)}, mixed,")


def _rounded(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Return float64 values in a dtype, through float32 if that is narrower."""
    if dtype == "F64":
        return values
    with computing(name):
        narrow = values.astype(np.float32)
    return cast(narrow, dtype, name)


def _named(lazy: Lazy) -> str:
    """Return a short text that names the stored tensors that it is made of."""
    found: list[TensorInfo] = list(lazy.sources())
    return listed(list(dict.fromkeys(info.name for info in found)))
