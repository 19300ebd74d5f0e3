"""The equal parts that a rank's rows of a step are cut into if they do not fit in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

from upcycle.blueprints.blueprint import Blueprint
from upcycle.training.course import Course
from upcycle.training.run import Run


def sizes(run: Run, built: Blueprint | None, lengths: Mapping[str, int], share: int) -> list[int]:
    """Return the numbers of rows that a forward pass on a rank may have, the fewest first.

    Parts of a rank's `share` of the rows are equal, and whole groups of every router. If the rows must not be
    cut, all of them are in one pass. `lengths` are the tokens of a row in each stack.
    """
    if not may_be_cut(run, built):
        return [share]
    whole = rows_of_groups(built, lengths)
    return [n for n in range(whole, share + 1, whole) if share % n == 0] or [share]


def may_be_cut(run: Run, built: Blueprint | None) -> bool:
    """Return whether the losses of parts add up to those of the batch, or nearly so (`balance_counts`)."""
    routed = built is not None and bool(built.sites)
    routers = [leg.run.router for leg in Course(run).legs]
    return not routed or all(router.balance_loss == "per_layer" for router in routers)


def rows_of_groups(built: Blueprint | None, lengths: Mapping[str, int]) -> int:
    """Return the smallest number of rows that is whole groups of every router.

    `lengths` are the tokens of a row in each stack.
    """
    recipes = built.parts if built else {}
    groups = {name: part.router.group for name, part in recipes.items() if part.router.group}
    return math.lcm(*(group // math.gcd(group, lengths[name]) for name, group in groups.items()))
