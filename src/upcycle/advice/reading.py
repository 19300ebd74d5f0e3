"""What a result says of a budget, and whether a run of nearly that budget says so too.

A result of a longer run can be read at a smaller budget, as long as it is said that the rate had not fallen
there. Our runs of a tenth of the start's FLOPs ended up to 0.02 nats less well, beside dense continuation,
than those of 30 % stood at a tenth.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from upcycle.advice.comparison import Better, Comparison, apart, covering, near, unlike
from upcycle.advice.situation import Situation
from upcycle.advice.statements import share
from upcycle.system.wording import rounded

NEAR_SHARE = 1.5  # a run is of nearly a budget if the two differ by this factor at most


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A result, read at a budget.

    `better` is what is ahead there; None if that is not told apart. `shorter` is a run of nearly this budget
    that did not end ahead, although the result itself has upcycling ahead there.
    """

    run: Comparison
    better: Better
    early: bool  # whether the rate of the run had not fallen there
    shorter: Comparison | None = None

    @property
    def caveat(self) -> str:
        """What is to be known of a reading within a longer run, in words; empty if it is none."""
        if not self.early:
            return ""
        assert self.run.share is not None
        longer = f"that run took {share(self.run.share[1])}, and its rate had not fallen there"
        said = f"; {longer}, which can flatter upcycling"
        if (run := self.shorter) is None:
            return said
        assert run.share is not None
        assert run.trained is not None
        whole = f"a whole run of {share(run.share[1])}, from {rounded(run.trained[0])} tokens per parameter"
        return f"{said}: in {whole}, it ended {run.ended}"


def readings(situation: Situation, comparisons: Iterable[Comparison]) -> list[Reading]:
    """Return what the results that cover a situation say of its budget, in their order."""
    known = list(comparisons)
    return [_reading(situation, run, known) for run in covering(situation, known)]


def _reading(situation: Situation, run: Comparison, known: Iterable[Comparison]) -> Reading:
    better, early = run.better_for(situation.share_of_cost), run.turns_early(situation.share_of_cost)
    if early and better == "upcycling":
        nearest = _of_nearly_the_budget(situation, run, known)
        if nearest is not None and nearest.better != "upcycling":
            return Reading(run=run, better=None, early=True, shorter=nearest)
    return Reading(run=run, better=better, early=early)


def _of_nearly_the_budget(
    situation: Situation, run: Comparison, known: Iterable[Comparison]
) -> Comparison | None:
    """Return the result in the way of `run` that took nearly the budget; the one from the nearest start."""
    taken = situation.share_of_cost
    assert taken is not None
    found = [
        one
        for one in known
        if one.way == run.way and one.share is not None and near(taken, (one.share[1],) * 2, NEAR_SHARE)
        if unlike(situation, one) is None
    ]
    return min(found, key=lambda one: apart(situation, one), default=None)
