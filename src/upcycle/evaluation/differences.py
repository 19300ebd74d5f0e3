"""A metric as a ratio of sums over units, its standard error, and the paired difference of two models.

Letters: N units (documents, passages, images, examples, seeds), in the same order for every model. Standard
errors are of the first order (the delta method) and treat units as drawn independently; where units are in
strata (the tasks of a group), the strata are taken as given and only units within them as drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """A metric whose value is sum(top) / sum(bottom): right answers over answers, nats over tokens."""

    top: np.ndarray  # float64 [N]
    bottom: np.ndarray  # float64 [N]
    units: str  # what they are, in the plural
    strata: np.ndarray | None = None  # int64 [N]

    @classmethod
    def mean(cls, values: np.ndarray, units: str, strata: np.ndarray | None = None) -> Sums:
        """The plain mean of `values`, [N]; of strata, the mean of their means."""
        values = np.asarray(values, np.float64)
        if strata is not None:
            _, place, count = np.unique(strata, return_inverse=True, return_counts=True)
            values = values * (len(values) / (len(count) * count[place]))
        return cls(top=values, bottom=np.ones_like(values), units=units, strata=strata)

    @property
    def value(self) -> float:
        """The metric."""
        return float(self.top.sum() / self.bottom.sum())

    @property
    def standard_error(self) -> float | None:
        """Of the value; None where there are too few units to tell."""
        return _standard_error(self._influence(), self.strata)

    def _influence(self) -> np.ndarray:
        """What each unit adds to the value, less what it would have to for the value to stay: [N], mean 0."""
        return (self.top - self.value * self.bottom) / self.bottom.mean()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much larger a metric of one model is than that of another, over the same units."""

    value: float
    standard_error: float | None
    units: str
    count: int


def difference(one: Sums, other: Sums) -> Difference:
    """`one` - `other`, paired unit by unit; both are over the same units in the same order."""
    assert len(one.top) == len(other.top)
    assert one.units == other.units
    error = _standard_error(one._influence() - other._influence(), one.strata)
    return Difference(
        value=one.value - other.value, standard_error=error, units=one.units, count=len(one.top)
    )


def _standard_error(influence: np.ndarray, strata: np.ndarray | None) -> float | None:
    """Of the mean of `influence`, [N]."""
    if strata is None:
        strata = np.zeros(len(influence), np.int64)
    variance = 0.0
    for stratum in np.unique(strata):
        inside = influence[strata == stratum]
        if len(inside) < 2:
            return None
        variance += len(inside) * float(np.var(inside, ddof=1))
    return float(variance**0.5 / len(influence))
