"""Seeds of torch's generators in a training run, one stream for each step, rank, micro batch and layer.

A seed needs no state in a checkpoint. It is a hash of what it is for (`tensors/rng.py`), so that no two
streams meet. The first micro batch of rank 0 keeps the formula of earlier versions, whose multipliers do not
collide there, so that runs on one process go on drawing the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from upcycle.tensors import rng

_LEAST, _MOST = -(1 << 63), (1 << 64) - 1  # the range of torch's generators


def torch_seed(value: int) -> int:
    """Return `value`, or its last 64 bits if it is outside torch's range."""
    return value if _LEAST <= value <= _MOST else value & _MOST


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """The seeds of one micro batch: its run's seed, step, data-parallel rank and number in the step."""

    run: int
    step: int
    rank: int = 0
    micro: int = 0

    @property
    def of_step(self) -> int:
        """The seed of torch's own generator in a step: of dropout, drop path and augmentation."""
        if not self.rank:
            return torch_seed(self.run * 1_000_003 + self.step * 997)
        return rng.key(self.run, "step", self.step, self.rank)[0]

    def of_layer(self, layer: int) -> int:
        """Return the seed of the noise on what the router of a layer reads."""
        if not self.rank and not self.micro:
            return torch_seed((self.run * 1_000_003 + self.step) * 4099 * 4099 + layer)
        return rng.key(self.run, "jitter", self.step, self.rank, self.micro, layer)[0]
