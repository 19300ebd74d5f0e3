"""Rows of tokens in an order that depends on the seed alone: resumed exactly, the same on any ranks.

A row is L + 1 ids in a row of a source: L predictions. Rows do not share predictions. The last part of each
source is held out. An epoch of a source is a permutation keyed by (seed, source, epoch); which source row
number n comes from is drawn by weight, keyed by (seed, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from upcycle import rng
from upcycle.errors import UpcycleError
from upcycle.training.corpus import Tokens


class Batches:
    """Rows from several token files, and a position among them."""

    def __init__(
        self, tokens: Sequence[Tokens], weights: Sequence[float], *, length: int, held_out: float, seed: int
    ) -> None:
        self._ids = [t.ids() for t in tokens]
        self._length, self._seed = length, seed
        total = sum(weights)
        self._shares = np.array([w / total for w in weights])
        rows = [(t.count - 1) // length for t in tokens]
        for file, n in zip(tokens, rows, strict=True):
            if n < 1:
                raise UpcycleError(
                    f"{file.name} has {file.count} tokens, less than one row of train.sequence_length + 1 = "
                    f"{length + 1}; shorten the rows, or give more text"
                )
        kept = [n - round(n * held_out) for n in rows]
        for file, n, trained in zip(tokens, rows, kept, strict=True):
            if not trained or (held_out and trained == n):
                what = "to train on" if not trained else "held out"
                raise UpcycleError(
                    f"{file.name} has {n} rows of {length} tokens; data.held_out = {held_out} leaves none {what}"
                )
        self._rows, self._kept = rows, kept
        self._sample, self._consumed = 0, [0] * len(kept)

    @property
    def epochs(self) -> list[float]:
        """How often each source has been gone through."""
        return [used / kept for used, kept in zip(self._consumed, self._kept, strict=True)]

    def state(self) -> dict[str, Any]:
        """The position, as JSON has it."""
        return {"sample": self._sample, "consumed": list(self._consumed)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self._sample, self._consumed = int(state["sample"]), [int(n) for n in state["consumed"]]

    def next(self, rows: int, part: slice = slice(None)) -> np.ndarray:
        """The next `rows` rows, of which those of `part` are read: int64 [N, L + 1]."""
        chosen = []
        for source in self._sources(rows):
            epoch, place = divmod(self._consumed[source], self._kept[source])
            order = rng.permutation(rng.key(self._seed, "rows", source, epoch), self._kept[source])
            chosen.append((source, int(order[place])))
            self._consumed[source] += 1
        self._sample += rows
        return self._read(chosen[part])

    def held_out(self, rows: int) -> np.ndarray:
        """At most `rows` held-out rows, shared among the sources by weight, always the same: [N, L + 1]."""
        chosen = []
        for source, share in enumerate(self._shares):
            there = range(self._kept[source], self._rows[source])
            wanted = min(len(there), max(1, round(rows * float(share))))
            places = np.linspace(0, len(there) - 1, wanted).round().astype(int)
            chosen += [(source, there[int(place)]) for place in places]
        return self._read(chosen[:rows])

    def _sources(self, rows: int) -> list[int]:
        """The sources of the next rows."""
        drawn = rng.uniforms(rng.key(self._seed, "sources"), self._sample, self._sample + rows)
        places = np.searchsorted(np.cumsum(self._shares), drawn, side="right")
        found: list[int] = np.minimum(places, len(self._shares) - 1).tolist()
        return found

    def _read(self, chosen: Sequence[tuple[int, int]]) -> np.ndarray:
        out = np.empty((len(chosen), self._length + 1), np.int64)
        for place, (source, row) in enumerate(chosen):
            start = row * self._length
            out[place] = self._ids[source][start : start + self._length + 1]
        return out
