"""Copies with Gaussian noise: the usual way to break symmetry, and the baseline "random noise upcycling"."""

from dataclasses import dataclass
from typing import Annotated

from upcycle.init import Init, Site
from upcycle.settings import AtLeast, Within
from upcycle.tensors.computed import Noise
from upcycle.tensors.feed_forward import FeedForward


@dataclass(frozen=True, kw_only=True)
class NoisyCopy(Init):
    """The dense network + sigma x N(0, 1) on a share of the neurons, which differs from expert to expert.

    If `relative` is true, sigma is in standard deviations of each matrix; otherwise it is absolute. The
    baseline of Nakamura et al. (ICLR 2025) is sigma = 0.02, relative = false, fraction = 0.5.
    """

    summary = "copies + Gaussian noise on a fraction of the neurons"

    sigma: Annotated[float, AtLeast(0)] = 0.01  # standard deviation of the noise
    relative: bool = True  # whether sigma is in standard deviations of each matrix
    fraction: Annotated[float, Within("[0, 1]")] = 1.0  # share of the neurons that get noise

    def expert(self, dense: list[FeedForward], e: int, site: Site) -> FeedForward:
        neurons = site.sample(self.fraction, site.dense_width, "noise neurons", e)
        if not self.sigma or not len(neurons):
            return dense[0]
        return dense[0].map(
            lambda name, axis, m: Noise(
                m, axis, self.sigma, self.relative, neurons, site.key(name, "noise", e)
            )
        )

    def preserves(self, site: Site) -> bool:
        return not self.sigma or not self.fraction


init = NoisyCopy
