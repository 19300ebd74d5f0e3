"""Neurons drawn in proportion to how strongly they fire, and the top channels (MoE Jetpack, eqs. 4 and 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from upcycle.init._from_statistics import FromStatistics
from upcycle.init._selecting import Choice, Selecting, drawn
from upcycle.tensors import rng
from upcycle.tensors.positions import Computed, Positions


@dataclass(frozen=True, kw_only=True)
class Measured(FromStatistics, Selecting):
    """A choice based on what `upcycle calibrate` measured; `statistics` is its file.

    `statistic` defines importance. The channels are those with the highest mean of it over the layers of a
    stack (equation 4). Heads are chosen whole: those of a layer with the highest sum over their elements.
    """

    needs = "init.statistics = FILE, from upcycle calibrate"

    statistic: Literal["l2", "l1", "count", "gradient"] = "l2"  # the measure of importance

    @property
    def collect(self) -> str:
        return self.statistic

    def choose(self, choice: Choice) -> Positions:
        kind, stack, layer = choice.kind, choice.stack, choice.layer
        for i in self._layers(choice):
            self.measured.info(kind, stack, i, self._read(choice))
        if layer is None:
            return self._computed(choice, self._top, [kind, stack])
        if kind == "heads":
            return self._computed(choice, self._top, [kind, stack, layer])
        return self._computed(choice, self.sampled, [kind, stack, layer, list(self._key(choice))])

    def sampled(self, choice: Choice) -> np.ndarray:
        """Return positions [count] drawn in proportion to their importance, ascending (equation 5)."""
        return np.sort(drawn(self._key(choice), self._scores(choice))[: choice.count])

    @property
    def settings(self) -> list[object]:
        """The values, besides the choice and its place, that decide the outcome, for the blueprint's hash."""
        return []

    def _read(self, choice: Choice) -> str:
        """Return the name of the statistic that a choice is made by."""
        return self.statistic

    def _layers(self, choice: Choice) -> Sequence[int]:
        """Return the blocks that a choice looks at."""
        return range(choice.blocks) if choice.layer is None else (choice.layer,)

    def _scores(self, choice: Choice) -> np.ndarray:
        """Return how important each channel, head or neuron is, float64 [total].

        The values are those of a block, or the sum over its blocks for a stack.
        """
        found = [self.measured.of(choice.kind, choice.stack, i, self.statistic) for i in self._layers(choice)]
        return np.sum(found, 0, dtype=np.float64).reshape(choice.total, -1).sum(1)

    def _top(self, choice: Choice) -> np.ndarray:
        return np.sort(np.argsort(-self._scores(choice), kind="stable")[: choice.count])

    def _key(self, choice: Choice) -> rng.Key:
        return choice.key("importance")

    def _computed(
        self, choice: Choice, compute: Callable[[Choice], np.ndarray], what: list[object]
    ) -> Computed:
        about = [self.name, self.statistic, self.measured.digest, choice.count, *what, *self.settings]
        return Computed(partial(compute, choice), choice.count, about)


@dataclass(frozen=True, kw_only=True)
class Importance(Measured):
    """The neurons of each expert are drawn by their activation norm (equation 5).

    They are drawn without replacement, each next one with a probability in proportion to its norm, and
    independently of the other experts.
    """

    summary = "neurons drawn by activation norm from a larger network, channels by the largest (MoE Jetpack)"


init = Importance
