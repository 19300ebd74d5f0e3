"""One statement of the advice: what is said, its source, and whether the input lies where it was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Choice = Literal["dense continuation", "upcycling", "from scratch"]


@dataclass(frozen=True, kw_only=True)
class Statement:
    """`inside` says whether the input lies in the range that the source covers: None where the source does
    not tell how far it reaches. `why` gives the reason, for all three."""

    topic: str
    said: str
    source: str
    inside: bool | None
    why: str
    value: float | None = None
    unit: str = ""


def number(n: float) -> str:
    """100 B, 1.5 T, 260 k: for sentences."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def size(n: float) -> str:
    """80 GB and the like, in decimal units."""
    return number(n).replace(" B", " G").rstrip() + ("B" if n >= 1e3 else " B")


def share(x: float) -> str:
    """42 %, 0.67 %, 250 %."""
    return f"{100 * x:.2g} %" if x < 0.1 else f"{100 * x:,.0f} %"
