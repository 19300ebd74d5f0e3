"""Seeds as torch takes them."""

from __future__ import annotations

_LEAST, _MOST = -(1 << 63), (1 << 64) - 1  # what torch's generators take


def torch_seed(value: int) -> int:
    """`value`, and where it is beyond 64 bits its last 64."""
    return value if _LEAST <= value <= _MOST else value & _MOST
