"""Random neurons and channels of a larger network (MoE Jetpack, equations 8 and 9)."""

from dataclasses import dataclass

from upcycle import rng
from upcycle.init._selecting import Kind, Selecting
from upcycle.positions import Order, Positions


@dataclass(frozen=True, kw_only=True)
class Random(Selecting):
    """A random subset for every expert, without replacement; channels are one subset for the whole model
    unless they are chosen per expert."""

    summary = "random neurons and channels of a larger network (MoE Jetpack)"

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
        return Order(rng.key(seed, kind, stack, layer, "random", who), total, 0, count, sort=True)


init = Random
