"""Formatting of numbers, sizes, places and commands for people, and parsing of numbers that people write."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from decimal import Decimal

from upcycle.errors import listed, printable

_LARGE = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))
_WRITTEN = re.compile(r"(\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE]\+?(\d{1,2}))?\s*([A-Za-z]*)")


def count(n: float) -> str:
    """Format a number with a prefix, such as 1.42 M."""
    return _scaled(n, ".2f", "g")


def rounded(n: float) -> str:
    """Format a number for a sentence with at most three digits: 100 B, 1.5 T, 260 k."""
    return _scaled(n, ".3g", ".3g")


def size(n: float) -> str:
    """Format a size in decimal units, such as 1.42 GB."""
    return _of_bytes(count(n), n)


def rounded_size(n: float) -> str:
    """Format a size in decimal units for a sentence, such as 80 GB."""
    return _of_bytes(rounded(n), n)


def _scaled(n: float, large: str, small: str) -> str:
    for scale, unit in _LARGE:
        if abs(n) >= scale:
            return f"{n / scale:{large}}{unit}"
    return f"{n:{small}}"


def _of_bytes(written: str, n: float) -> str:
    return written.replace(" B", " G").rstrip() + ("B" if n >= 1e3 else " B")


def number_in(text: str, units: Mapping[str, int]) -> Decimal | None:
    """Parse a number such as 1.5, 2_000 or 1e9, with or without one of the `units`, exactly.

    Returns None if the text is not a number.
    """
    found = _WRITTEN.fullmatch(text.strip())
    if found is None or found[3] not in units or (found[2] and found[3]):
        return None
    return Decimal(found[1].replace("_", "")).scaleb(int(found[2] or 0)) * units[found[3]]


def quoted(*words: object) -> str:
    """Quote the words of a command for the shell."""
    return " ".join(map(_quoted, map(str, words)))


def _quoted(word: str) -> str:
    if not word.isprintable():
        text = word.replace("\\", "\\\\").replace("'", "\\'")
        return f"$'{printable(text)}'"
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


def layers_of(places: list[str]) -> str:
    """Return some layers, given by their places, as `layer 2` or `layers 0, 2`; of many, the first eight."""
    return f"layer{'s' if len(places) > 1 else ''} {listed(places, 8)}"


def place_of(stack: str, layer: int) -> str:
    """Return the name of a layer: its number, after its stack if the model has several."""
    return str(layer) if stack == "layers" else f"{stack} {layer}"
