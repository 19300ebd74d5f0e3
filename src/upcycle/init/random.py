"""Random neurons and channels of a larger network (MoE Jetpack, equations 8 and 9)."""

from dataclasses import dataclass

from upcycle.init._selecting import Choice, Selecting
from upcycle.tensors.positions import Order, Positions


@dataclass(frozen=True, kw_only=True)
class Random(Selecting):
    """Each expert has a random subset, drawn without replacement.

    The channels are one subset for the whole model, unless they are chosen per expert.
    """

    summary = "random neurons and channels of a larger network (MoE Jetpack)"

    def choose(self, choice: Choice) -> Positions:
        return Order(choice.key("random"), choice.total, 0, choice.count, sort=True)


init = Random
