"""How numbers, sizes and places are written for people."""

from __future__ import annotations


def count(n: float) -> str:
    """1.42 M and the like."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(n) >= size:
            return f"{n / size:.2f}{unit}"
    return f"{n:g}"


def size(n: float) -> str:
    """1.42 GB and the like, in decimal units."""
    return count(n).replace(" B", " G").rstrip() + ("B" if n >= 1e3 else " B")


def place_of(stack: str, layer: int) -> str:
    """A layer as people name it: its number, after its stack if a model has several."""
    return str(layer) if stack == "layers" else f"{stack} {layer}"
