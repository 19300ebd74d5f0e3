"""Where one curve comes to lie below another: both are straight between their points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["crosses", "from the start", "none", "back above", "apart"]


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """How curve a lies to curve b over what both cover, and at which `x` it comes below to stay.

    `verdict` is `crosses` (at `x`), `from the start` (never above), `none` (never below), `back above` (below
    for a while, not at the end) or `apart` (nothing is covered by both). `end` is the last x that both have,
    `gap` is a - b there.
    """

    verdict: Verdict
    x: float | None = None
    end: float | None = None
    gap: float | None = None


def crossing(x_a: np.ndarray, y_a: np.ndarray, x_b: np.ndarray, y_b: np.ndarray) -> Crossing:
    """Compare curve a with curve b; x [n] rises strictly in both. Lower is better."""
    if not x_a.size or not x_b.size:
        return Crossing(verdict="apart")
    first, last = max(x_a[0], x_b[0]), min(x_a[-1], x_b[-1])
    if first >= last:
        return Crossing(verdict="apart")
    x = np.unique(np.concatenate([x_a, x_b, [first, last]]))
    x = x[(x >= first) & (x <= last)]
    gap = np.interp(x, x_a, y_a) - np.interp(x, x_b, y_b)
    end, at_end = float(x[-1]), float(gap[-1])
    above = np.flatnonzero(gap > 0)
    if not (gap < 0).any():
        return Crossing(verdict="none", end=end, gap=at_end)
    if at_end >= 0:
        return Crossing(verdict="back above", end=end, gap=at_end)
    if not above.size:
        return Crossing(verdict="from the start", x=float(x[0]), end=end, gap=at_end)
    i = int(above[-1])
    share = gap[i] / (gap[i] - gap[i + 1])
    return Crossing(verdict="crosses", x=float(x[i] + share * (x[i + 1] - x[i])), end=end, gap=at_end)
