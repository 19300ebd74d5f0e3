"""The part of a family that only training needs: initial values, depth of parameters, residual branches."""

from __future__ import annotations

from collections.abc import Mapping

from upcycle.errors import UpcycleError
from upcycle.families import Config, Family, Stack, Weights
from upcycle.families._weights import Initial, Weight


class Trained(Family):
    """A family that can be trained from scratch, with learning rates by depth and with drop path."""

    before: tuple[str, ...]  # prefixes of the parameters before the blocks, in memory below the base model
    after: tuple[str, ...]  # prefixes of the parameters after the blocks, likewise

    def deviation(self, config: Config) -> float:
        """Return the standard deviation that a matrix starts with."""
        return float(config.get("initializer_range", 0.02))

    def initial(self, config: Config, name: str, weight: Weight) -> Initial | None:
        """Return the initial value of the tensor called `name` on disk; None if it is unknown."""
        return weight.initial(self.deviation(config))

    def depth(self, name: str, counts: Mapping[str, int]) -> int:
        """Return how deep in the model a parameter is, by its name in memory below the base model.

        With N blocks, the depth is 0 before them, i + 1 in block i (from 0), and N + 1 after them. `counts`
        has the lists of blocks (`Stack.blocks`) and how many each holds; numbers continue from one list to
        the next. Raises `UpcycleError` for an unknown name.
        """
        start = 0
        for blocks, count in counts.items():
            if name.startswith(f"{blocks}."):
                return start + int(name.removeprefix(f"{blocks}.").partition(".")[0]) + 1
            start += count
        if name.startswith(self.before):
            return 0
        if name.startswith(self.after):
            return start + 1
        raise UpcycleError(
            f"train.layer_decay: the family {self.model_type} does not say how deep {name} lies; name it in "
            f"`before` or `after` of its file, or take train.layer_decay out"
        )

    def class_head(self, config: Config) -> Weights:
        """Return the tensors of the head that have a row for each class and that `weights` does not list."""
        return {}

    def branches(self, config: Config, stack: Stack) -> tuple[str, ...]:
        """Return the modules in memory, below the base model, whose output joins the residual stream."""
        return ()

    def own_norm(self, config: Config, stack: Stack) -> str:
        """Return the norm in memory, below the base model, that only the network reads, or ""."""
        return ""


def trained(family: Family, what: str) -> Trained:
    """Return the family as training needs it.

    `what` is the key of the run file that needs it. Raises `UpcycleError` for a family that can only convert.
    """
    if isinstance(family, Trained):
        return family
    raise UpcycleError(
        f"{what}: the family {family.model_type} only converts, and does not say what training asks (initial "
        f"values, depths, branches); take {what.partition(' ')[0]} out"
    )
