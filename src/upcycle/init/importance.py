"""Neurons drawn in proportion to how strongly they fire, channels by the largest (MoE Jetpack, equations 4,
5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from upcycle import rng
from upcycle.errors import UpcycleError
from upcycle.init._selecting import Kind, Selecting, drawn
from upcycle.once import once
from upcycle.positions import Computed, Positions
from upcycle.statistics import Statistics

if TYPE_CHECKING:
    from upcycle.source import Dense


@dataclass(frozen=True, kw_only=True)
class Measured(Selecting):
    """A choice by what `upcycle calibrate` measured; `statistics` is its file.

    `statistic` is what counts as important. Channels are the top of its mean over the layers of a stack
    (equation 4), whole heads the top of their layer by the sum over their elements.
    """

    needs = "init.statistics = FILE, from upcycle calibrate"

    statistics: str = ""
    statistic: Literal["l2", "l1", "count", "gradient"] = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.statistics:
            raise UpcycleError(
                f"init {self.name} chooses by activations: measure them with `upcycle calibrate SOURCE "
                f"--out FILE` and set init.statistics = FILE"
            )
        if Path(self.statistics).is_file():  # the recipe is kept with its result, and read from elsewhere
            object.__setattr__(self, "statistics", str(Path(self.statistics).resolve()))

    @property
    def measured(self) -> Statistics:
        """The file of statistics."""
        path = Path(self.statistics)
        return _opened(path, path.stat().st_mtime_ns) if path.is_file() else Statistics.open(path)

    def admit(self, dense: Dense) -> None:
        self.measured.refuse_other(dense)

    def scores(self, kind: Kind, stack: str, layer: int, total: int) -> np.ndarray:
        """How important each channel, head or neuron of a block is, float64 [total]."""
        found = self.measured.of(kind, stack, layer, self.statistic).astype(np.float64)
        return found if kind != "heads" else found.reshape(total, -1).sum(1)

    def choose(
        self,
        kind: Kind,
        stack: str,
        layer: int | None,
        *,
        total: int,
        count: int,
        seed: int,
        blocks: int,
        who: int | None = None,
    ) -> Positions:
        if layer is None:
            return self._computed(
                lambda: _top(np.sum([self.scores(kind, stack, i, total) for i in range(blocks)], 0), count),
                count,
                [kind, stack],
            )
        if kind == "heads":
            return self._computed(
                lambda: _top(self.scores(kind, stack, layer, total), count), count, [kind, stack, layer]
            )
        key = rng.key(seed, kind, stack, layer, "importance", who)
        return self._computed(
            lambda: self.sampled(kind, stack, layer, total, count, key),
            count,
            [kind, stack, layer, list(key)],
        )

    def sampled(self, kind: Kind, stack: str, layer: int, total: int, count: int, key: rng.Key) -> np.ndarray:
        """`count` positions drawn in proportion to their importance (equation 5)."""
        return np.sort(drawn(key, self.scores(kind, stack, layer, total))[:count])

    def _computed(self, compute: Callable[[], np.ndarray], count: int, what: list[object]) -> Computed:
        return Computed(compute, count, [self.name, self.statistic, self.measured.digest, count, *what])


@once(maxsize=4)
def _opened(path: Path, mtime: int) -> Statistics:
    return Statistics.open(path)


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    """The positions of the `count` largest, ascending."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


@dataclass(frozen=True, kw_only=True)
class Importance(Measured):
    """Each expert's neurons are drawn without replacement, each next one with a probability in proportion to
    its activation norm (equation 5), and independently of the other experts."""

    summary = "neurons drawn by activation norm from a larger network, channels by the largest (MoE Jetpack)"


init = Importance
