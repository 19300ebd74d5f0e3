"""The canonical feed-forward network, the point where every family meets every initialisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from upcycle.computed import Affine
from upcycle.lazy import Lazy, Slice, Take
from upcycle.positions import Positions


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """down(act(gate x) * (up x)), with gate and up [I, H] and down [H, I].

    Neuron i is row i of gate and up and column i of down.
    """

    gate: Lazy
    up: Lazy
    down: Lazy

    NEURON_AXES = {"gate": 0, "up": 0, "down": 1}  # where the neurons lie in each matrix

    @property
    def width(self) -> int:
        """The number of neurons, I."""
        return self.gate.shape[0]

    def map(self, change: Callable[[str, int, Lazy], Lazy]) -> FeedForward:
        """`change(matrix name, neuron axis, matrix)` applied to each matrix."""
        return FeedForward(
            **{name: change(name, axis, getattr(self, name)) for name, axis in self.NEURON_AXES.items()}
        )

    def matrices(self) -> dict[str, Lazy]:
        """gate, up and down by name."""
        return {name: getattr(self, name) for name in self.NEURON_AXES}

    def neurons(self, start: int, stop: int) -> FeedForward:
        """Neurons `start` to `stop`."""
        return self.map(lambda _, axis, m: Slice(m, axis, start, stop))

    def take(self, positions: Positions) -> FeedForward:
        """The given neurons, in the given order."""
        return self.map(lambda _, axis, m: Take(m, axis, positions))

    def scaled(self, *, gate: float = 1.0, up: float = 1.0, down: float = 1.0) -> FeedForward:
        """Each matrix times a factor; a factor of one leaves the matrix as it is."""
        factors = {"gate": gate, "up": up, "down": down}
        return self.map(lambda name, _, m: m if factors[name] == 1.0 else Affine(m, scale=factors[name]))
