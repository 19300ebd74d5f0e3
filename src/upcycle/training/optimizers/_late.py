"""The steps of Adam for weights that had no gradients in some of the updates that are counted for them."""

from __future__ import annotations

from typing import Final

_STEPS: Final = 1000  # the largest of all steps is among the first few dozen


def largest_late_step(worked: float, idle: float, *, beta1: float, beta2: float) -> float:
    """Return the largest step of a weight, in learning rates, whose gradient is steady, or zero.

    It was steady for `worked` updates, zero for `idle` ones, and is steady again. Both moments shrink while
    it is zero, and the count of updates corrects them as if it had not been: the mean of squares grows to
    its size again more slowly than the mean of gradients. Without idle updates every step is 1.
    """

    def moment(beta: float, n: int) -> float:
        kept = beta ** (idle + n) * (1 - beta**worked)
        return (1 - beta**n + kept) / (1 - beta ** (worked + idle + n))

    return max(float(moment(beta1, n) / moment(beta2, n) ** 0.5) for n in range(1, _STEPS + 1))
