"""Metrics as ratios of sums over units, their standard errors, and paired differences of two models.

Letters: N units (documents, passages, images, examples, seeds), in the same order for every model. Standard
errors are of first order (the delta method) and treat units as independent draws. If the units are in strata
(the tasks of a group), the strata are fixed and only the units within them are draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """A metric whose value is sum(top) / sum(bottom), such as right answers / answers or nats / tokens."""

    top: np.ndarray  # float64 [N]
    bottom: np.ndarray  # float64 [N]
    units: str  # a noun in the plural, such as "documents"
    strata: np.ndarray | None = None  # int64 [N]

    @classmethod
    def mean(cls, values: np.ndarray, units: str, strata: np.ndarray | None = None) -> Sums:
        """Return the mean of `values` [N]; with strata, the mean of the means of the strata."""
        values = np.asarray(values, np.float64)
        if strata is not None:
            _, place, count = np.unique(strata, return_inverse=True, return_counts=True)
            values = values * (len(values) / (len(count) * count[place]))
        return cls(top=values, bottom=np.ones_like(values), units=units, strata=strata)

    @property
    def value(self) -> float:
        """The value of the metric."""
        return float(self.top.sum() / self.bottom.sum())

    @property
    def standard_error(self) -> float | None:
        """The standard error of the value; None if there are too few units to estimate it."""
        return _standard_error(self._influence(), self.strata)

    def _influence(self) -> np.ndarray:
        """Return the influence of each unit on the value [N]; its mean is 0."""
        return (self.top - self.value * self.bottom) / self.bottom.mean()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of a metric between two models over the same units."""

    value: float
    standard_error: float | None
    units: str
    count: int


def difference(one: Sums, other: Sums) -> Difference:
    """Return `one` - `other`, paired by unit; both must have the same units in the same order."""
    assert len(one.top) == len(other.top)
    assert one.units == other.units
    error = _standard_error(one._influence() - other._influence(), one.strata)
    return Difference(
        value=one.value - other.value, standard_error=error, units=one.units, count=len(one.top)
    )


def _standard_error(influence: np.ndarray, strata: np.ndarray | None) -> float | None:
    """Return the standard error of the mean of `influence` [N]; None if a stratum has a single unit."""
    if strata is None:
        strata = np.zeros(len(influence), np.int64)
    variance = 0.0
    for stratum in np.unique(strata):
        inside = influence[strata == stratum]
        if len(inside) < 2:
            return None
        variance += len(inside) * float(np.var(inside, ddof=1))
    return float(variance**0.5 / len(influence))
