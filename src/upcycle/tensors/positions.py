"""Which neurons, in which order: positions along an axis of a lazy tensor, known when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from upcycle.tensors import rng


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


@dataclass(frozen=True, eq=False)
class Units:
    """Positions of whole units of `size` elements: heads, for example, in a row of their elements."""

    units: Positions
    size: int

    @property
    def values(self) -> np.ndarray:
        return (self.units.values[:, None] * self.size + np.arange(self.size)).reshape(-1)

    def __len__(self) -> int:
        return len(self.units) * self.size

    def describe(self) -> Any:
        return ["units", self.size, self.units.describe()]


Positions = Order | Given | Computed | Units
