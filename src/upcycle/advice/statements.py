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


def share(x: float) -> str:
    """42 %, 0.67 %, 250 %."""
    return f"{100 * x:.2g} %" if x < 0.1 else f"{100 * x:,.0f} %"
