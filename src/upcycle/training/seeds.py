"""Converts seeds to the range that torch accepts."""

from __future__ import annotations

_LEAST, _MOST = -(1 << 63), (1 << 64) - 1  # the range of torch's generators


def torch_seed(value: int) -> int:
    """Return `value`, or its last 64 bits if it is outside torch's range."""
    return value if _LEAST <= value <= _MOST else value & _MOST
