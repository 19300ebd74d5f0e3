"""Evenly spaced neurons and channels, the same for every expert (Weight Selection, Xu et al., ICLR 2024)."""

from dataclasses import dataclass

import numpy as np

from upcycle.init import Site
from upcycle.init._selecting import Choice, Selecting, given, spread
from upcycle.tensors.positions import Positions


@dataclass(frozen=True, kw_only=True)
class Uniform(Selecting):
    """Position i of n' is floor(i n / n') of n (MoE Jetpack, equation 7).

    With the preset `repo` it is the i-th of n' evenly spaced positions from the first to the last.
    """

    summary = "evenly spaced neurons and channels of a larger network, all experts alike (Weight Selection)"

    def choose(self, choice: Choice) -> Positions:
        total, count = choice.total, choice.count
        return given(np.arange(count) * total // count if self.preset == "paper" else spread(total, count))

    def warnings(self, site: Site) -> list[str]:
        return ["uniform selection gives every expert the same neurons: only training makes them differ"]


init = Uniform
