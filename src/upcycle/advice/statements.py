"""One statement of the advice: its text, its source, and whether the source covers the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Choice = Literal["dense continuation", "upcycling", "from scratch"]


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A statement with its source.

    `inside` says whether the input lies in the range that the source covers. It is None if the source does
    not tell how far it reaches. `why` gives the reason in all three cases.
    """

    topic: str
    said: str
    source: str
    inside: bool | None
    why: str
    value: float | None = None
    unit: str = ""


def share(x: float) -> str:
    """Return a share in per cent, such as `42 %`, `0.67 %` or `250 %`."""
    return f"{100 * x:.2g} %" if x < 0.1 else f"{100 * x:,.0f} %"
