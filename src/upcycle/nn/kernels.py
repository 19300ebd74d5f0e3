"""How the experts of a model run: as grouped matrix products, or one after another.

torch's grouped products want rows that are a multiple of 16 bytes long. No torch here: a conversion asks too.
"""

from __future__ import annotations

from collections.abc import Iterable

ROW = 16  # bytes
GROUPED, ONE_BY_ONE = "grouped_mm", "eager"  # as transformers calls them
KEY = "experts_implementation"  # in config.json


def take_groups(lengths: Iterable[int], itemsize: int) -> bool:
    """Whether grouped products take matrices with rows of these lengths, in numbers of `itemsize` bytes."""
    return all(length * itemsize % ROW == 0 for length in lengths)


def implementation(lengths: Iterable[int], itemsize: int) -> str:
    """The implementation for such experts where nobody asks for another one."""
    return GROUPED if take_groups(lengths, itemsize) else ONE_BY_ONE
