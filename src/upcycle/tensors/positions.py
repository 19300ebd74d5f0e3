"""Positions along an axis of a lazy tensor, such as neurons in a given order; computed when needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from upcycle.tensors import rng


@dataclass(frozen=True)
class Order:
    """Places `start` to `stop` of the random order of range(n) that `key` names."""

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
    """A list of positions that the recipe or a file gives."""

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
    """A list of `length` positions, computed from the weights when first needed.

    `name` must distinguish the outcome from every other over the same `base`, because it is what is hashed.
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
    """The positions of whole units of `size` elements, for example heads in a row of their elements."""

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
