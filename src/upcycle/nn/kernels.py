"""The choice of how experts run: as grouped matrix products, or one after another.

torch's grouped products need rows of a multiple of 16 bytes, and take no float64. This module does not import
torch, because a conversion uses it too.
"""

from __future__ import annotations

from collections.abc import Iterable

ROW = 16  # bytes
WIDEST = 4  # bytes of a number
GROUPED, ONE_BY_ONE = "grouped_mm", "eager"  # their names in transformers
FOLLOWING = "grouped_mm_autocast"  # grouped products that follow autocast (`grouped.py`)
IN_GROUPS = (GROUPED, FOLLOWING)
EXPERT_BY_EXPERT = "expert_by_expert"  # our own, for a CPU (`expert_by_expert.py`)
KEY = "experts_implementation"  # the key in config.json


def take_groups(lengths: Iterable[int], itemsize: int) -> bool:
    """Return whether grouped products accept matrices with rows of these lengths.

    `itemsize` is the size of a number in bytes.
    """
    return itemsize <= WIDEST and all(length * itemsize % ROW == 0 for length in lengths)


def implementation(lengths: Iterable[int], itemsize: int) -> str:
    """Return the implementation for such experts if the user asks for none."""
    return GROUPED if take_groups(lengths, itemsize) else ONE_BY_ONE
