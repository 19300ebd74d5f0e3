"""Upcycling beside dense continuation: one result, and whether it covers a model and a budget."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Literal

from upcycle.advice.experts import Experts
from upcycle.advice.situation import Kind, Situation
from upcycle.advice.statements import share
from upcycle.system.wording import rounded

NEAR = 2.0  # a paper covers models up to so many times larger or smaller than its own
NEAR_BUDGET = 4.0  # the same for tokens
SLACK = 1.05  # and for a share of the dense cost: slices cost 1.01 times the dense FLOPs, and steps are whole
Better = Literal["upcycling", "dense continuation"] | None
UNREAD = "what was read of the source does not say how many experts a token had, and in which layers"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Upcycling and dense continuation on one budget, in `tokens` or as a `share` of the dense cost.

    `better` is None if they end level. If `ahead` is given, upcycling is ahead from that share on, the dense
    model is up to `behind`, and between them they are level. `falling` is the share from which the learning
    rate falls; before it, a run of the same budget would end elsewhere. `trained` is what the dense models
    had seen, in tokens per parameter, fewest and most; None: not asked. `against` is the dense model that was
    trained on, if it was not the source.
    """

    paper: str
    kind: Kind
    inits: tuple[str, ...]
    sizes: tuple[float, float]
    better: Better
    found: str
    experts: Experts
    tokens: float | None = None
    share: tuple[float, float] | None = None
    ahead: float | None = None
    behind: float | None = None
    falling: float | None = None
    trained: tuple[float, float] | None = None
    against: str | None = None

    @property
    def way(self) -> tuple[Hashable, ...]:
        """What results have in common that differ in the dense model's training and the budget alone."""
        return self.paper, self.kind, self.inits, self.sizes, self.experts, self.tokens, self.against

    def better_for(self, taken: float | None) -> Better:
        """Return what is ahead after a share of the dense cost; None if that is not told apart."""
        if taken is None or (self.share is not None and taken * SLACK >= self.share[1]):
            return self.better
        if self.behind is not None and taken <= self.behind:
            return "dense continuation"
        return None if self.ahead is not None and taken < self.ahead else self.better

    def turns_early(self, taken: float | None) -> bool:
        """Return whether `ahead` says of a share of the dense cost what a longer run says of it."""
        if taken is None or self.ahead is None or self.falling is None:
            return False
        return taken < self.falling

    @property
    def ended(self) -> str:
        """How upcycling ended beside dense continuation, in a word."""
        return {"upcycling": "ahead", "dense continuation": "behind", None: "level"}[self.better]

    @property
    def stood(self) -> str:
        """How upcycling stood beside dense continuation along the way, in words."""
        if self.better == "dense continuation":
            return "behind to the end"
        before = [] if self.behind is None else [f"behind until {share(self.behind)}"]
        if self.ahead is None:
            return ", ".join([*before, "level at the end"])
        return " and ".join([*before, f"ahead from {share(self.ahead)} on"])


def covering(situation: Situation, comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Return the results that cover a situation, in their order.

    Of those that differ in `trained` and `share` alone, the one whose dense model was trained most nearly as
    long is taken, and of these the one with the smallest budget, whose rate fell the nearest to this one's.
    """
    found: dict[tuple[Hashable, ...], list[Comparison]] = {}
    for one in comparisons:
        if one.kind == situation.kind and inside(situation, one)[0]:
            found.setdefault(one.way, []).append(one)
    return [min(alike, key=lambda one: (apart(situation, one), one.share or ())) for alike in found.values()]


def passed(situation: Situation, comparisons: Iterable[Comparison]) -> Comparison | None:
    """Return the result that would cover a situation if the budget were not past its longest run.

    Of several, the one whose dense model was trained most nearly as long is taken, and of these the longest.
    """
    taken = situation.share_of_cost
    found = [
        (apart(situation, one), -one.share[1], place, one)
        for place, one in enumerate(comparisons)
        if taken is not None and one.share is not None and one.kind == situation.kind
        if taken > one.share[1] * SLACK and unlike(situation, one) is None
    ]
    return min(found)[-1] if found else None


def apart(situation: Situation, comparison: Comparison) -> float:
    """Return how far the training of the dense model lies from that of a result, as a ratio of 1 or more."""
    if situation.trained is None or comparison.trained is None:
        return 1.0
    low, high = comparison.trained
    return max(low / situation.trained, situation.trained / high, 1.0)


def inside(situation: Situation, comparison: Comparison) -> tuple[bool | None, str]:
    """Return whether a comparison covers a situation, and the reason. None: the source does not tell."""
    if (other := unlike(situation, comparison)) is not None:
        return other
    like = f"{rounded(situation.plan.dense_parameters)} parameters"
    if comparison.share is None:
        return True, f"{like}, {rounded(situation.asked.tokens)} tokens are near"
    taken, (low, high) = situation.share_of_cost, comparison.share
    if taken is None:
        return None, "it needs --dense-tokens, the tokens that the dense model was trained on"
    if taken < low / SLACK:
        return False, f"{share(taken)} of the dense cost, found at {share(low)} to {share(high)}"
    if taken > high * SLACK:
        place = f"past the {share(high)} of this result, where upcycling ended {comparison.ended}"
        return False, f"{share(taken)} of the dense cost, {place}"
    early = f", where the rate of that run of {share(high)} had not fallen"
    at = early if comparison.turns_early(taken) else ""
    return True, f"{like}, {share(taken)} of the dense cost{at}"


def unlike(situation: Situation, comparison: Comparison) -> tuple[Literal[False] | None, str] | None:
    """Return why a comparison does not cover a situation, whatever share of the dense cost is spent.

    The result is as that of `inside`, or None if there is no such reason.
    """
    if not of_its_init(situation, comparison):
        name = situation.built.recipe.init.name
        return False, f"found with init {' or '.join(comparison.inits)}, and init.name = {name}"
    if reasons := comparison.experts.unlike(situation):
        return False, "; ".join(reasons)
    if not near(situation.plan.dense_parameters, comparison.sizes, NEAR):
        return False, sizes(situation, comparison.sizes)
    if comparison.tokens is not None:
        tokens = situation.asked.tokens
        if not near(tokens, (comparison.tokens, comparison.tokens), NEAR_BUDGET):
            return False, f"{rounded(tokens)} tokens, found at {rounded(comparison.tokens)}"
        if not comparison.experts.complete:
            return None, f"{UNREAD}, nor the settings of init.name = {situation.built.recipe.init.name}"
    if comparison.trained is not None:
        if situation.trained is None:
            return None, "it needs --dense-tokens, the tokens that the dense model was trained on"
        if not near(situation.trained, comparison.trained, NEAR):
            seen = " to ".join(f"{n:g}" for n in dict.fromkeys(comparison.trained))
            return False, f"{situation.trained:.2g} tokens per parameter seen before, found at {seen}"
    return None


def of_its_init(situation: Situation, comparison: Comparison) -> bool:
    """Return whether experts are made as in the result."""
    named = situation.built.recipe.init.name in comparison.inits
    return named or (situation.copies and "copy" in comparison.inits)


def near(value: float, between: tuple[float, float], factor: float) -> bool:
    """Return whether a value lies in a range, or outside it by a factor at most."""
    return between[0] / factor <= value <= between[1] * factor


def sizes(situation: Situation, of_result: tuple[float, float]) -> str:
    """Return the size of the model beside those of a result, in words."""
    found = " to ".join(rounded(n) for n in dict.fromkeys(of_result))
    return f"{rounded(situation.plan.dense_parameters)} dense parameters, found on {found}"
