"""The data given to a task, and the feed that the task makes of it: rows in an order that can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from upcycle.data.corpus import Data
from upcycle.data.documents import Source
from upcycle.data.readings import Reading
from upcycle.data.stamps import Stamp


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """The data that a task reads, the length of its rows, and the seed of their order."""

    data: Data
    length: int  # tokens per row of text
    seed: int  # seed of the order of the rows and of the draws for each row
    cache: Path  # folder of prepared files: tokens, decoded images
    readings: tuple[Reading, ...] = ()  # where the sources are read on; empty: from their first rows
    setting: str = "train.sequence_length"  # what the user calls `length`, for messages
    checked: Mapping[str, Stamp] = field(default_factory=dict)  # prepared files that another process checked

    @classmethod
    def of_file(
        cls,
        path: Path,
        *,
        length: int,
        cache: Path,
        seed: int = 0,
        separator: str | None = None,
        field: str = Source.field,
    ) -> Feeding:
        """Return a feeding with all rows of one file or folder, outside of a run; nothing is held out."""
        data = Data(sources=(Source(path=str(path), separator=separator, field=field),))
        return cls(data=data, length=length, seed=seed, cache=cache, setting="length")


class Feed(Protocol):
    """The rows of a task, N at a time, as arrays whose first axis is N."""

    @property
    def trainable(self) -> list[int]:
        """The number of training rows of each source."""

    def next(self, rows: int, part: slice = slice(None)) -> dict[str, np.ndarray]:
        """Advance by `rows` rows and return those in `part`: arrays [B, ...] by name."""

    def at(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows numbered `places`, int64 [N], of the first source, without moving the position."""

    def held_out(self, rows: int | None = None) -> dict[str, np.ndarray]:
        """Return rows that are never trained on, always the same ones: all, or at most `rows`."""

    def state(self) -> dict[str, Any]:
        """Return the position as JSON."""

    def known(self) -> list[tuple[str, Any]]:
        """Return the name of each set that is read, and by what it is known again, as JSON."""

    def checked(self) -> dict[str, Stamp]:
        """Return the stamps of prepared files that were made here, or were read whole and found undamaged."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises `UpcycleError` if the data has changed since."""
