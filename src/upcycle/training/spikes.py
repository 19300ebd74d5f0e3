"""Notices steps that stand out, on the device, so that their update can be left out without waiting for them.

A step stands out if its loss, or the norm of its gradient, is more than sigma standard deviations above the
mean of the last steps. That is the rule of OLMo-core's SkipStepOptimizer, with its window and its sigma.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from upcycle.training.sections import Spikes


class Recent:
    """Loss and gradient norm of the last finite steps.

    They are [2, window] in float64 on the device, and NaN if they are not known.
    """

    def __init__(self, settings: Spikes, device: torch.device) -> None:
        self.settings, self._device = settings, device
        self._values: Tensor
        self.restore()

    def judge(self, loss: Tensor, norm: Tensor, finite: Tensor) -> Tensor:
        """Return whether a step stands out, [] on the device, and take it in if it is `finite`.

        At least half a window must be known.
        """
        known = ~self._values.isnan()
        count = known[0].sum()
        mean = self._values.where(known, 0).sum(1) / count
        spread = ((self._values - mean[:, None]).square().where(known, 0).sum(1) / (count - 1)).sqrt()
        now = torch.stack([loss, norm]).double()
        out = (now - mean > self.settings.sigma * spread).any() & (2 * count >= self.settings.window) & finite
        self._values = torch.cat([self._values[:, 1:], now[:, None]], 1).where(finite, self._values)
        return out

    def known(self) -> tuple[tuple[float, ...], ...]:
        """Return loss and norm of the steps that are known, oldest first; waits for the device."""
        pairs = self._values.T.tolist()
        return tuple(tuple(pair) for pair in pairs if pair[0] == pair[0])

    def restore(self, known: Sequence[Sequence[float]] = ()) -> None:
        """Know these steps and no others."""
        values = torch.full((2, self.settings.window), float("nan"), dtype=torch.float64)
        if last := [*known][-self.settings.window :]:
            values[:, -len(last) :] = torch.tensor(last, dtype=torch.float64).T
        self._values = values.to(self._device)


@dataclass(kw_only=True)
class Pace:
    """Notices that training has become slow: the last steps against the median of many before them."""

    least: float  # share of the median; 0: never
    now: int = 10
    before: int = 100
    _speeds: deque[float] = field(default_factory=deque)
    _slow: bool = False

    def falls(self, tokens_per_s: float) -> tuple[float, float] | None:
        """Take in a step's throughput; return that of now and before if it has just become slow."""
        self._speeds.append(tokens_per_s)
        while len(self._speeds) > self.now + self.before:
            self._speeds.popleft()
        earlier, last = [*self._speeds][: -self.now], [*self._speeds][-self.now :]
        if len(earlier) < 2 * self.now:
            return None
        usual, here = median(earlier), sum(last) / len(last)
        was, self._slow = self._slow, here < self.least * usual
        return (here, usual) if self._slow and not was else None
