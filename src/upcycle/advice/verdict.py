"""One sentence: dense continuation, upcycling or from scratch, and how sure that is.

The fitted law decides if it covers the input. If it does not, published results of models like this one
decide. If there are none, the verdict says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from upcycle.advice import comparison as compared
from upcycle.advice import drop_ratio, own_runs, published, scaling_law
from upcycle.advice.comparison import Comparison
from upcycle.advice.reading import Reading, readings
from upcycle.advice.situation import Situation
from upcycle.advice.statements import Choice, share
from upcycle.system.wording import rounded

Sure = Literal["fitted law", "published runs", "rule of thumb", "not known"]
CLOSE = 0.01  # nats; two losses of the law that are closer than this are not told apart
MEASURE = "measure it: two short runs of upcycle train, with and without [moe]"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer in one sentence. `choice` is None if the sources do not give one.

    `unsettled` says why, unless the reason is that no source shows that upcycling pays.
    """

    choice: Choice | None
    sure: Sure
    sentence: str
    unsettled: str = ""


NOTHING_OF_GROWTH = Verdict(
    choice=None,
    sure="not known",
    sentence="Nothing is known about this input: every source that advise has is about experts "
    "made of a dense model, and [grow] copies those that are there; measure it: a short run of upcycle "
    "train, beside the source trained on by another program.",
    unsettled="no source that advise has is about a model that grows",
)


def verdict(situation: Situation) -> Verdict:
    """Return the verdict that follows from the sources."""
    if situation.grows:
        return NOTHING_OF_GROWTH
    losses = scaling_law.losses(situation)
    found = _by_law(losses) if losses else _by_results(situation)
    drop = drop_ratio.in_place_of_copies(situation)
    if drop is None or found.sure == "not known" or found.choice not in (None, "upcycling"):
        return found
    sentence = f"{found.sentence.removesuffix('.')}; for upcycling with drop, {drop.said} ({drop.source})."
    return replace(found, sentence=sentence)


def _by_law(found: dict[Choice, float]) -> Verdict:
    best, second, *_ = ordered = sorted(found, key=found.__getitem__)
    told = ", ".join(f"{what} {found[what]:.3f}" for what in ordered)
    given = f"the fitted law gives {told} nats per token"
    init = ", init copy," if best == "upcycling" else ""  # the law is fitted on copies alone
    if "dense continuation" not in found:
        given += "; how dense continuation compares is not known, as the law does not reach so many tokens"
    sure = "sure as far as one fit on one corpus is"
    choice: Choice | None = None
    unsettled = ""
    if found[second] - found[best] < CLOSE:
        unsettled = f"the fitted law does not tell {best} and {second} apart here"
        said = f"Too close to call between {best} and {second}: {given}; {MEASURE}."
    elif "dense continuation" not in found:
        unsettled = "the fitted law does not reach dense continuation here"
        said = f"Rather {best}{init} than {second}: {given} ({sure})."
    else:
        choice, said = best, f"{best[0].upper()}{best[1:]}{init} is best: {given} ({sure})."
    return Verdict(choice=choice, sure="fitted law", sentence=said, unsettled=unsettled)


def _by_results(situation: Situation) -> Verdict:
    scratch, why = _against_scratch(situation)
    beyond = "the fitted law does not reach this input"
    runs = readings(situation, published.EVERY_COMPARISON)
    if scratch == "above":
        return Verdict(
            choice="from scratch",
            sure="rule of thumb",
            sentence=f"Probably from scratch: {why}; a rule of thumb, as {beyond}.",
        )
    if runs and scratch != "disagree":
        rest = f"not from scratch, as {why}" if scratch == "below" else f"against from scratch, {why}"
        return _by_run(situation, runs[0], f"{rest}; {beyond}")
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
    if longest := compared.passed(situation, own_runs.COMPARISONS):
        return _past(situation, longest, f"{beyond} and {why}")
    if _dense_tokens_would_help(situation):
        return Verdict(
            choice=None,
            sure="not known",
            sentence="Nothing can be said without --dense-tokens: the results that cover this input depend "
            f"on how many tokens the dense model was trained on. If that is not known, {MEASURE}.",
        )
    return Verdict(
        choice=None,
        sure="not known",
        sentence=f"Nothing is known about this input: {beyond} and {why}; {MEASURE}.",
    )


def _past(situation: Situation, run: Comparison, rest: str) -> Verdict:
    """Return the verdict on a budget past the longest run on models like this one."""
    assert situation.share_of_cost is not None
    assert run.share is not None
    assert run.trained is not None
    against = f" against {run.against}" if run.against else ""
    place = (
        f"{share(situation.share_of_cost)} of the dense cost is past the longest run ({share(run.share[1])})"
    )
    seen = f"whose dense model had seen {rounded(run.trained[0])} tokens per parameter"
    return Verdict(
        choice=None,
        sure="not known",
        sentence=f"Nothing is known about this budget: {place}, where upcycling ended {run.ended}"
        f"{against} on models like this one ({run.paper}), {seen}; {rest}; {MEASURE}.",
        unsettled="this budget is past the longest run on models like this one",
    )


def _by_run(situation: Situation, reading: Reading, rest: str) -> Verdict:
    """Return the verdict of the result that is nearest to the input."""
    run, better = reading.run, reading.better
    same = "at equal tokens, not equal FLOPs" if run.tokens else "at equal cost"
    same += f" against {run.against}" if run.against else ""
    like = f"on models like this one {same} ({run.paper}){_place_of_run(situation, reading)}"
    if better is None:
        how = "which come out level" if reading.shorter is None else "as runs disagree"
        said = f"Too close to call between dense continuation and upcycling, {how} {like}"
        rest += f"; {MEASURE}"
    else:
        own = situation.built.recipe.init.name
        init = f", init {own if own in run.inits else 'copy'}," if better == "upcycling" else ""
        said = f"Probably {better}{init} as found {like}"
    return Verdict(choice=better, sure="published runs", sentence=f"{said}; {rest}.")


def _place_of_run(situation: Situation, reading: Reading) -> str:
    """Return how long the dense model of a result was trained, and where upcycling stood along the way."""
    run = reading.run
    if run.trained is None or situation.share_of_cost is None:
        return ""
    seen, here = rounded(run.trained[0]), share(situation.share_of_cost)
    return (
        f", the nearest of which had seen {seen} tokens per parameter: upcycling was {run.stood}, and this "
        f"budget is {here} of the dense cost{reading.caveat}"
    )


def _against_scratch(situation: Situation) -> tuple[Literal["below", "above", "disagree", "unknown"], str]:
    """Return the side of the crossovers that may cover the input on which the budget lies, and the reason."""
    covering = [
        crossover
        for crossover in published.CROSSOVERS
        if published.crossover_inside(situation, crossover)[0] is not False
    ]
    if not covering:
        return "unknown", "no published crossover is of a model like it"
    distances = {c: d for c in covering if (d := published.distance(situation, c)) is not None}
    if not distances:
        return "unknown", "without --dense-tokens this budget cannot be compared with a published crossover"
    places = ", and ".join(_place(crossover, far) for crossover, far in distances.items())
    said = f"this budget is {places}"
    sides = {far >= 1 for far in distances.values()}
    if len(sides) == 2:
        return "disagree", said
    return ("above" if True in sides else "below"), said


def _place(crossover: published.Crossover, far: float) -> str:
    """Return the place of a budget beside a crossover, in words and in the crossover's own unit."""
    name, side = crossover.paper.partition(" (")[0], "past" if far >= 1 else "short of"
    here, there = share(far * crossover.at), share(crossover.at)
    return f"{here} of the dense {crossover.unit}, {side} the {there} of {name}"


def _dense_tokens_would_help(situation: Situation) -> bool:
    """Return whether a source would say more if the dense model's training were known."""
    if situation.asked.dense_tokens is not None:
        return False
    if scaling_law.outside(situation) == [scaling_law.NEEDS_DENSE_TOKENS]:
        return True
    if any(published.crossover_inside(situation, c)[0] is not False for c in published.CROSSOVERS):
        return True
    return any(
        comparison.kind == situation.kind
        and comparison.share is not None
        and compared.inside(situation, comparison)[0] is not False
        for comparison in published.EVERY_COMPARISON
    )
