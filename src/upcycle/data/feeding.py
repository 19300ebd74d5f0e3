"""What a task is fed with, and the feed that it makes of it: rows in an order that can be gone on with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from upcycle.data.corpus import Data
from upcycle.data.documents import Source


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """Which data a task reads, cut into rows of which length, in an order that the seed decides."""

    data: Data
    length: int  # tokens of a row of text
    seed: int  # of the order of the rows, and of what is drawn for each
    cache: Path  # folder of prepared files: tokens, decoded images

    @classmethod
    def of_file(
        cls, path: Path, *, length: int, cache: Path, seed: int = 0, separator: str | None = None
    ) -> Feeding:
        """All rows of one file or folder; nothing is held out."""
        data = Data(sources=(Source(path=str(path), separator=separator),))
        return cls(data=data, length=length, seed=seed, cache=cache)


class Feed(Protocol):
    """The rows of a task, N at a time, as arrays whose first axis is N."""

    @property
    def trainable(self) -> list[int]:
        """How many rows of each source are trained on."""

    def next(self, rows: int, part: slice = slice(None)) -> dict[str, np.ndarray]:
        """The next `rows` rows, of which those of `part` are read."""

    def at(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """The rows numbered `places`, int64 [N], of the first source. The position stays."""

    def held_out(self, rows: int | None = None) -> dict[str, np.ndarray]:
        """Rows that are never trained on, always the same: all, or at most `rows`."""

    def state(self) -> dict[str, Any]:
        """The position, as JSON has it."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position. Raises `UpcycleError` if the data has changed since."""
