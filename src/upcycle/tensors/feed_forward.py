"""The canonical feed-forward network, the common form between every family and every initialisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from upcycle.tensors.computed import Affine
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.moved import Slice, Take
from upcycle.tensors.positions import Positions


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """down(act(gate x) * (up x)), with gate and up [I, H] and down [H, I]; plain networks have no gate.

    Neuron i is row i of gate and up and column i of down. Biases, if there are any, are [I] for gate and up
    and [H] for down. `grn_weight` and `grn_bias`, [I], are those of a global response norm between the
    activation and down (ConvNeXt V2).
    """

    up: Lazy
    down: Lazy
    gate: Lazy | None = None
    gate_bias: Lazy | None = None
    up_bias: Lazy | None = None
    down_bias: Lazy | None = None
    grn_weight: Lazy | None = None
    grn_bias: Lazy | None = None

    NEURON_AXES = {"gate": 0, "up": 0, "down": 1}  # the axis of the neurons in each matrix
    BIASES = ("gate_bias", "up_bias", "down_bias")
    RESPONSE = ("grn_weight", "grn_bias")

    @property
    def width(self) -> int:
        """The number of neurons, I."""
        return self.up.shape[0]

    @property
    def hidden(self) -> int:
        """The size of input and output, H."""
        return self.up.shape[1]

    def matrices(self) -> dict[str, Lazy]:
        """Return gate (if there is one), up and down by name."""
        return {name: m for name in self.NEURON_AXES if (m := getattr(self, name)) is not None}

    def biases(self) -> dict[str, Lazy]:
        """Return the biases that exist, by name."""
        return {name: b for name in self.BIASES if (b := getattr(self, name)) is not None}

    def response(self) -> dict[str, Lazy]:
        """Return weight and bias of the response norm by name, if there is one."""
        return {name: t for name in self.RESPONSE if (t := getattr(self, name)) is not None}

    def map(self, change: Callable[[str, int, Lazy], Lazy]) -> FeedForward:
        """Apply `change(matrix name, neuron axis, matrix)` to each matrix; biases stay."""
        made = {n: change(n, self.NEURON_AXES[n], m) for n, m in self.matrices().items()}
        return replace(self, **made)

    def _rearranged(self, change: Callable[[int, Lazy], Lazy]) -> FeedForward:
        """Apply `change(neuron axis, tensor)` to every tensor with a neuron axis."""
        of_neurons = self.biases() | self.response()
        vectors = {n: change(0, b) for n, b in of_neurons.items() if n != "down_bias"}
        return replace(self.map(lambda _, axis, m: change(axis, m)), **vectors)

    def neurons(self, start: int, stop: int) -> FeedForward:
        """Return neurons `start` to `stop`."""
        return self._rearranged(lambda axis, t: Slice(t, axis, start, stop))

    def take(self, positions: Positions) -> FeedForward:
        """Return the given neurons, in the given order."""
        return self._rearranged(lambda axis, t: Take(t, axis, positions))

    def narrowed(self, positions: Positions) -> FeedForward:
        """Return the network with only the given channels of input and output."""
        made = self.map(lambda _, axis, m: Take(m, 1 - axis, positions))
        return made if self.down_bias is None else replace(made, down_bias=Take(self.down_bias, 0, positions))

    def scaled(
        self, *, gate: float = 1.0, up: float = 1.0, down: float = 1.0, down_bias: float = 1.0
    ) -> FeedForward:
        """Multiply each tensor by its factor.

        Biases of gate and up take the factors of their matrices. A factor of one changes nothing.
        """
        factors = {"gate": gate, "up": up, "down": down}
        factors |= {"gate_bias": gate, "up_bias": up, "down_bias": down_bias}
        tensors = self.matrices() | self.biases()
        return replace(
            self, **{n: Affine(t, scale=factors[n]) for n, t in tensors.items() if factors[n] != 1.0}
        )

    @staticmethod
    def merged(networks: list[FeedForward], merge: Callable[[list[Lazy]], Lazy]) -> FeedForward:
        """Return one network, each tensor of which is `merge` of the same tensor of all networks."""
        first = networks[0]
        names = [*first.matrices(), *first.biases(), *first.response()]
        return replace(first, **{n: merge([getattr(network, n) for network in networks]) for n in names})
