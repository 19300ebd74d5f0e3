"""How far a run has read each source: feeds that share a source share this, and go on from each other.

A reading keeps the order of its rows until the next epoch, because to sort many of them takes long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import numpy as np

from upcycle.data.corpus import Data
from upcycle.tensors import rng


@dataclass(kw_only=True)
class Reading:
    """The place in a source."""

    number: int = 0  # of the source in the run, for the key of the order of its rows
    consumed: int = 0  # rows read so far, in all epochs
    _key: rng.Key | None = field(default=None, init=False, repr=False, compare=False)  # of the order
    _order: np.ndarray = field(
        default_factory=lambda: np.empty(0, np.int64), init=False, repr=False, compare=False
    )

    def next(self, seed: int, rows: int) -> int:
        """Return the number of the next row of a source that has `rows`, and go on."""
        epoch, place = divmod(self.consumed, rows)
        order = self.order(rng.key(seed, "rows", self.number, epoch), rows)
        self.consumed += 1
        return int(order[place])

    def order(self, key: rng.Key, rows: int) -> np.ndarray:
        """Return the order of an epoch of so many rows, int64 [N]; it is kept until another is asked for."""
        if key != self._key or len(self._order) != rows:
            self._key, self._order = key, rng.permutation(key, rows)
        return self._order


class Readings:
    """The readings of a run. Tables of data with the same source have one of it together."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Reading] = {}

    def of(self, data: Data) -> tuple[Reading, ...]:
        """Return the readings of the sources of a table, in order.

        A source is the same if its rows and the held-out ones among them are, whatever its weight. One that
        stands in a table twice has two readings there.
        """
        times: Counter[Hashable] = Counter()
        out = []
        for source in data.sources:
            rows = replace(data, sources=(replace(source, weight=1.0),), isolate=False, cache=None)
            times[rows] += 1
            new = Reading(number=len(self._found))
            out.append(self._found.setdefault((rows, times[rows]), new))
        return tuple(out)


def fresh(count: int) -> tuple[Reading, ...]:
    """Return readings of so many sources of which nothing is read yet."""
    return tuple(Reading(number=number) for number in range(count))
