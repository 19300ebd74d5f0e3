"""How numbers, sizes and places are written for people, and how numbers that people write are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

_LARGE = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))
_WRITTEN = re.compile(r"(\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE]\+?(\d{1,2}))?\s*([A-Za-z]*)")


def count(n: float) -> str:
    """1.42 M and the like."""
    return _scaled(n, ".2f", "g")


def rounded(n: float) -> str:
    """100 B, 1.5 T, 260 k: three digits at most, for sentences."""
    return _scaled(n, ".3g", ".3g")


def size(n: float) -> str:
    """1.42 GB and the like, in decimal units."""
    return _of_bytes(count(n), n)


def rounded_size(n: float) -> str:
    """80 GB and the like, in decimal units."""
    return _of_bytes(rounded(n), n)


def _scaled(n: float, large: str, small: str) -> str:
    for scale, unit in _LARGE:
        if abs(n) >= scale:
            return f"{n / scale:{large}}{unit}"
    return f"{n:{small}}"


def _of_bytes(written: str, n: float) -> str:
    return written.replace(" B", " G").rstrip() + ("B" if n >= 1e3 else " B")


def number_in(text: str, units: Mapping[str, int]) -> Decimal | None:
    """The number that a person wrote, as 1.5, 2_000, 1e9 or one before one of the `units`, exactly; None if
    the text is none."""
    found = _WRITTEN.fullmatch(text.strip())
    if found is None or found[3] not in units or (found[2] and found[3]):
        return None
    return Decimal(found[1].replace("_", "")).scaleb(int(found[2] or 0)) * units[found[3]]


def place_of(stack: str, layer: int) -> str:
    """A layer as people name it: its number, after its stack if a model has several."""
    return str(layer) if stack == "layers" else f"{stack} {layer}"
