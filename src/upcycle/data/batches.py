"""Rows of tokens in an order that depends only on the seed: it resumes exactly, on any number of ranks.

A row is L + 1 consecutive ids of a source and makes L predictions, which no other row makes. The last rows of
each source are held out. An epoch of a source is a permutation keyed by (seed, source, epoch). The source of
row number n is drawn by weight, keyed by (seed, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from upcycle.data.corpus import Tokens
from upcycle.data.folders import put_back
from upcycle.data.readings import Reading, fresh
from upcycle.errors import UpcycleError
from upcycle.tensors import rng

Places = list[tuple[int, int]]  # a source and the number of a row of it, for each row


class Batches:
    """Rows from several token files, with a position that can be saved.

    The sources are read on from `readings`, which other batches may share; by default, from their first rows.
    Raises `UpcycleError` for a source that is too short for one training row, or for a held-out one if asked;
    `setting` is what the user calls `length`.
    """

    def __init__(
        self,
        tokens: Sequence[Tokens],
        weights: Sequence[float],
        *,
        length: int,
        held_out: float,
        seed: int,
        readings: Sequence[Reading] = (),
        setting: str = "train.sequence_length",
    ) -> None:
        self._tokens, self._ids = tokens, [t.ids() for t in tokens]
        self._length, self._seed = length, seed
        self._shares = np.asarray(weights, np.float64) / sum(weights)
        self._rows = [(t.count - 1) // length for t in tokens]
        self.trainable = [n - round(n * held_out) for n in self._rows]
        """The number of training rows of each source."""
        for source, n, trained in zip(tokens, self._rows, self.trainable, strict=True):
            if n < 1:
                raise UpcycleError(
                    f"{source.name} has {source.count} tokens, fewer than a row of {setting} + 1 "
                    f"= {length + 1}; shorten the rows, or give more text"
                )
            if not trained or (held_out and trained == n):
                raise UpcycleError(
                    f"{source.name} has {n} rows of {length} tokens, of which data.held_out = {held_out} "
                    f"leaves none {'held out' if trained else 'to train on'}; change it, shorten the rows, "
                    f"or give more text"
                )
        self._sample, self._readings = 0, readings or fresh(len(tokens))

    @property
    def position(self) -> int:
        """The number of rows given out so far."""
        return self._sample

    @property
    def epochs(self) -> list[float]:
        """The number of passes over each source."""
        pairs = zip(self._readings, self.trainable, strict=True)
        return [reading.consumed / rows for reading, rows in pairs]

    def state(self) -> dict[str, Any]:
        """Return the position as JSON."""
        state: dict[str, Any] = {"sample": self._sample}
        state["consumed"] = [reading.consumed for reading in self._readings]
        state["tokens"] = [t.count for t in self._tokens]
        hashes = [t.sha256 for t in self._tokens]
        return state if None in hashes else {**state, "sha256": hashes}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises `UpcycleError` if the sources have changed since."""
        names, counts = [t.name for t in self._tokens], [t.count for t in self._tokens]
        hashes = [t.sha256 for t in self._tokens]
        _refuse_damaged(state)
        if len(state["tokens"]) != len(counts):
            raise UpcycleError(
                f"the checkpoint is of {len(state['tokens'])} data sources and the run has {len(counts)}; "
                f"put them back, or start a new run"
            )
        for name, before, now in zip(names, state["tokens"], counts, strict=True):
            if before != now:
                raise UpcycleError(
                    f"{name} has {now} tokens and had {before} when the checkpoint was saved; "
                    f"{put_back(name)}, or start a new run"
                )
        for name, before, digest in zip(names, state.get("sha256", hashes), hashes, strict=True):
            if None not in (before, digest) and before != digest:
                raise UpcycleError(
                    f"{name} has other tokens than it had when the checkpoint was saved, though as many; put "
                    f"the data back as it was, or start a new run"
                )
        self._sample = state["sample"]
        for reading, consumed in zip(self._readings, state["consumed"], strict=True):
            reading.consumed = consumed

    def next(self, rows: int, part: slice = slice(None)) -> np.ndarray:
        """Advance by `rows` rows and return those in `part`: int64 [N, L + 1]."""
        return self.ids(self.draw(rows, part))

    def draw(self, rows: int, part: slice = slice(None)) -> Places:
        """Advance by `rows` rows and return the places of those in `part`."""
        chosen: Places = [
            (source, self._readings[source].next(self._seed, self.trainable[source]))
            for source in self._sources(rows)
        ]
        self._sample += rows
        return chosen[part]

    def held_out(self, rows: int | None = None) -> np.ndarray:
        """Return held-out rows, always the same ones: int64 [N, L + 1]."""
        return self.ids(self.kept(rows))

    def kept(self, rows: int | None = None) -> Places:
        """Return the places of held-out rows, always the same ones.

        These are all of them, or at most `rows`, divided between the sources by weight. If `rows` allows,
        every source has one.
        """
        there = [n - trained for n, trained in zip(self._rows, self.trainable, strict=True)]
        wanted = there if rows is None else self._shared(rows)
        chosen: Places = []
        for source, (n, most) in enumerate(zip(there, wanted, strict=True)):
            taken = min(n, most)
            chosen += [(source, self.trainable[source] + i * n // taken) for i in range(taken)]
        return chosen

    def _shared(self, rows: int) -> list[int]:
        """Divide `rows` by weight, after one for each source."""
        n = len(self._shares)
        if rows < n:
            return [1] * rows + [0] * (n - rows)
        ends = np.round(np.cumsum(self._shares) * (rows - n)).astype(int)
        return [1 + int(more) for more in np.diff(ends, prepend=0)]

    def _sources(self, rows: int) -> list[int]:
        """Draw the sources of the next rows."""
        drawn = rng.uniforms(rng.key(self._seed, "sources"), self._sample, self._sample + rows)
        places = np.searchsorted(np.cumsum(self._shares), drawn, side="right")
        found: list[int] = np.minimum(places, len(self._shares) - 1).tolist()  # shares may sum to less than 1
        return found

    def ids(self, places: Places) -> np.ndarray:
        """Return the rows at `places`: int64 [N, L + 1]."""
        out = np.empty((len(places), self._length + 1), np.int64)
        for number, (source, row) in enumerate(places):
            start = row * self._length
            out[number] = self._ids[source][start : start + self._length + 1]
        return out

    def positions(self, places: Places) -> np.ndarray:
        """Return how many ids of its document are before each id of the rows at `places`: int64 [N, L + 1].

        Only those of the same row count. So a position of zero begins a document, or what a row has of it.
        """
        out = np.empty((len(places), self._length + 1), np.int64)
        for number, (source, row) in enumerate(places):
            here = row * self._length + np.arange(self._length + 1)
            starts = self._starts[source]
            begins = starts[np.searchsorted(starts, here, side="right") - 1]
            out[number] = here - np.maximum(begins, here[0])
        return out

    @cached_property
    def _starts(self) -> list[np.ndarray]:
        return [source.first_ids() for source in self._tokens]


def _refuse_damaged(state: dict[str, Any]) -> None:
    """Raise `UpcycleError` for a malformed position."""
    lists = [state.get("tokens"), state.get("consumed")]
    whole = _is_count(state.get("sample")) and all(
        isinstance(each, list) and all(map(_is_count, each)) for each in lists
    )
    if not whole or len(state["consumed"]) != len(state["tokens"]):
        raise UpcycleError("what the checkpoint says of its place in the data is damaged; delete its folder")
    hashes = state.get("sha256", state["tokens"])
    if not isinstance(hashes, list) or len(hashes) != len(state["tokens"]):
        raise UpcycleError("what the checkpoint says of its data is damaged; delete its folder")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
