"""The point where one curve falls below another for good.

`crossing` takes both curves as straight between their points, as a figure draws them; the result then depends
on the number of points. `standing` uses the points alone: between two of them a falling loss lies between
their values, so that fewer points make its answers wider but never different.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

_SAME = 1e-9  # two x with a smaller relative difference are equal

Verdict = Literal["crosses", "from the start", "none", "back above", "apart"]


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """The relation of curve a to curve b over their common range, and the `x` where a falls below for good.

    `verdict` is `crosses` (at `x`), `from the start` (never above), `none` (never below), `back above` (below
    for a while, not at the end) or `apart` (no common range). `end` is the last common x, and `gap` is a - b
    there.
    """

    verdict: Verdict
    x: float | None = None
    end: float | None = None
    gap: float | None = None


def crossing(x_a: np.ndarray, y_a: np.ndarray, x_b: np.ndarray, y_b: np.ndarray) -> Crossing:
    """Compare curve a with curve b. Both have strictly rising x [n]; lower y is better."""
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


Sign = Literal["below", "above", "cannot be told", "apart"]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The relation of curve a to curve b, by the measured points alone.

    `sign` is the sign of a - b at `end`, the last common x, where a - b is between `low` and `high`.
    `between` holds the points on either side of `end` of the curve that has no point there (None: both have
    one). `since` is the interval in which a falls below for good: not before its first number (None: a was
    never above), and at the latest at its second. It is None if a is not below at the end.
    """

    sign: Sign
    end: float | None = None
    low: float | None = None
    high: float | None = None
    between: tuple[float, float] | None = None
    since: tuple[float | None, float] | None = None
    lost_again: bool = False  # True if a was below for a while and is above at the end


def standing(x_a: np.ndarray, y_a: np.ndarray, x_b: np.ndarray, y_b: np.ndarray) -> Standing:
    """Compare curve a with curve b at their points. Both have strictly rising x [n]; lower y is better."""
    if not x_a.size or not x_b.size:
        return Standing(sign="apart")
    first, last = max(x_a[0], x_b[0]), min(x_a[-1], x_b[-1])
    if first >= last:
        return Standing(sign="apart")
    x = np.unique(np.concatenate([x_a, x_b]))
    x = x[(x >= first) & (x <= last)]
    (low_a, high_a), (low_b, high_b) = bounds(x, x_a, y_a), bounds(x, x_b, y_b)
    low, high = low_a - high_b, high_a - low_b
    below, above = high < 0, low > 0
    sign: Sign = "below" if below[-1] else "above" if low[-1] >= 0 else "cannot be told"
    since = None
    if below[-1]:
        doubtful = np.flatnonzero(~below)
        surely = np.flatnonzero(above)
        by = int(doubtful[-1]) + 1 if doubtful.size else 0
        since = (float(x[surely[-1]]) if surely.size else None, float(x[by]))
    around = next((b for b in (_around(last, x_a), _around(last, x_b)) if b is not None), None)
    return Standing(
        sign=sign,
        end=float(last),
        low=float(low[-1]),
        high=float(high[-1]),
        between=around,
        since=since,
        lost_again=sign == "above" and bool(below.any()),
    )


def bounds(at: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of a curve at `at` [n]: its value at a point, else the values on either side."""
    left, right = _neighbours(at, x)
    return np.minimum(y[left], y[right]), np.maximum(y[left], y[right])


def _around(at: float, x: np.ndarray) -> tuple[float, float] | None:
    """Return the points on either side of `at`; None if there is a point at it."""
    left, right = (int(n[0]) for n in _neighbours(np.array([at]), x))
    return None if left == right else (float(x[left]), float(x[right]))


def _neighbours(at: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the points on either side of `at` [n].

    They are the same index if a point lies there, up to rounding.
    """
    right = np.searchsorted(x, at * (1 - _SAME), side="left")
    return np.where(x[right] <= at * (1 + _SAME), right, right - 1), right
