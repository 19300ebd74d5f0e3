"""The blocks of numbers that share a scale in a moment of 8 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

LARGEST = 256  # most numbers that share a scale
_FEWEST = 32  # fewest


def block_of(shape: Sequence[int], least: int) -> int | None:
    """Return how many numbers of the last axis share a scale; None if the moments are not quantised."""
    if len(shape) < 2 or math.prod(shape) < least:
        return None
    return next((size for size in range(LARGEST, _FEWEST - 1, -1) if shape[-1] % size == 0), None)
