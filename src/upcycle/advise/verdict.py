"""One sentence: dense continuation, upcycling or from scratch, and how sure that is.

The fitted law decides where it reaches. Elsewhere published results of models like this one do; where there
are none, that is what is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from upcycle.advise import drop_ratio, published, scaling_law
from upcycle.advise.situation import Situation
from upcycle.advise.statements import Choice, number, share

Sure = Literal["fitted law", "published runs", "rule of thumb", "not known"]
CLOSE = 0.01  # nats between two losses of the law that are not told apart
MEASURE = "measure it: two short runs of upcycle train, with and without [moe]"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`choice` is None where the sources do not say."""

    choice: Choice | None
    sure: Sure
    sentence: str


def verdict(situation: Situation) -> Verdict:
    """What follows from the statements."""
    if found := scaling_law.losses(situation):
        return _by_law(situation, found)
    return _by_results(situation)


def _by_law(situation: Situation, found: dict[Choice, float]) -> Verdict:
    best, second, *_ = ordered = sorted(found, key=found.__getitem__)
    told = ", ".join(f"{what} {found[what]:.3f}" for what in ordered)
    given = f"the fitted law gives {told} nats per token"
    init = f", {initialisation(situation)}," if best == "upcycling" else ""
    if "dense continuation" not in found:
        given += "; how dense continuation compares is not known, as the law does not reach so many tokens"
    sure = "sure as far as one fit on one corpus is"
    choice: Choice | None = None
    if found[second] - found[best] < CLOSE:
        said = f"Too close to call between {best} and {second}: {given}; {MEASURE}."
    elif "dense continuation" not in found:
        said = f"Rather {best}{init} than {second}: {given} ({sure})."
    else:
        choice, said = best, f"{best[0].upper()}{best[1:]}{init} is best: {given} ({sure})."
    return Verdict(choice=choice, sure="fitted law", sentence=said)


def _by_results(situation: Situation) -> Verdict:
    scratch, why = _against_scratch(situation)
    beyond = "the fitted law does not reach this input"
    runs = [
        comparison
        for comparison in published.COMPARISONS
        if comparison.kind == situation.kind and published.comparison_inside(situation, comparison)[0]
    ]
    if scratch == "above":
        return Verdict(
            choice="from scratch",
            sure="rule of thumb",
            sentence=f"Probably from scratch: {why}; a rule of thumb, as {beyond}.",
        )
    if runs and scratch != "disagree":
        first, better = runs[0], runs[0].better
        same = "at equal tokens, not equal FLOPs" if first.tokens else "at equal cost"
        rest = f"not from scratch, as {why}" if scratch == "below" else f"against from scratch, {why}"
        said = f"upcycling, {initialisation(situation)}," if better == "upcycling" else better
        return Verdict(
            choice=better,
            sure="published runs",
            sentence=f"Probably {said} as found on models like this one {same} ({first.paper}); {rest}; "
            f"{beyond}.",
        )
    if scratch == "below":
        return Verdict(
            choice=None,
            sure="rule of thumb",
            sentence=f"Not from scratch, as {why}; whether upcycling is worth more than dense continuation "
            f"is not known for this input ({beyond}): {MEASURE}.",
        )
    if scratch == "disagree":
        return Verdict(
            choice=None,
            sure="rule of thumb",
            sentence=f"Not settled: {why}, and {beyond}: {MEASURE}.",
        )
    if situation.asked.dense_tokens is None:
        return Verdict(
            choice=None,
            sure="not known",
            sentence="This cannot be said without --dense-tokens, what the dense model was trained on: the "
            f"fitted law and the published crossovers ask for it; else {MEASURE}.",
        )
    return Verdict(
        choice=None,
        sure="not known",
        sentence=f"Nothing is known about this input: {beyond} and {why}; {MEASURE}.",
    )


def _against_scratch(situation: Situation) -> tuple[Literal["below", "above", "disagree", "unknown"], str]:
    """On which side of the published crossovers the budget lies, of those that may cover it."""
    covering = [
        crossover
        for crossover in published.CROSSOVERS
        if published.crossover_inside(situation, crossover)[0] is not False
    ]
    if not covering:
        return "unknown", "no published crossover is of a model like it"
    distances = {c: d for c in covering if (d := published.distance(situation, c)) is not None}
    if not distances:
        return "unknown", "without --dense-tokens no published crossover can be compared with"
    below = [c for c, d in distances.items() if d < 1]
    above = [c for c, d in distances.items() if d >= 1]
    cost = f"this budget is {share(situation.share_of_cost or 0)} of what the dense model cost"
    if below and above:
        return "disagree", (
            f"{cost}, past the crossover of {_names(above)} and short of that of {_names(below)}"
        )
    side = "past" if above else "short of"
    return ("above" if above else "below"), f"{cost}, {side} the crossover of {_names(above or below)}"


def _names(crossovers: list[published.Crossover]) -> str:
    return " and ".join(c.paper.partition(" (")[0] for c in crossovers)


def initialisation(situation: Situation) -> str:
    """How to make the experts, for the budget, as an option of the recipe."""
    ratio = drop_ratio.advised(situation.asked.tokens) if situation.kind == "decoder" else 0.0
    if ratio is None:
        return "init copy or drop, which of them is not known at this budget"
    asked = f"init {situation.built.recipe.init.name}"
    if ratio and situation.copies:
        return f"init drop at r = {ratio:g} ({number(situation.asked.tokens)} tokens suffice for it)"
    return "init copy" if not ratio and situation.copies else asked
