"""The summary: one sentence, a table, and the problems with the given folders."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from upcycle.evaluation.differences import difference
from upcycle.reporting import formats
from upcycle.reporting.checkpoints import CheckpointRecord
from upcycle.reporting.comparison import Group, Pair, difference_of, measured
from upcycle.reporting.document import Block, Section, Sentence, Table
from upcycle.reporting.study import Study


def section(study: Study) -> Section:
    """Return the first section of the report."""
    # The main question is the continuation of the same dense model; the table of crossings has all pairs.
    asked = [
        pair
        for pair in study.comparison.pairs
        if pair.group.kind == "upcycled" and pair.against.kind == "dense, continued"
    ]
    own = [pair for pair in asked if not pair.other_source]
    pairs = [pair for pair in own if pair.standing.end is not None]
    sound = any(not pair.diverged for pair in pairs)
    said = _answer(study, pairs) if sound else _diverged(own) or _nothing(study, asked)
    blocks: list[Block] = [Sentence(text=said)]
    if pairs:
        blocks.append(_table(pairs))
        blocks += [Sentence(text=text, tone="small") for text in _unanswered(asked)]
    blocks += [Sentence(text=trouble, tone="warning") for trouble in study.troubles()]
    return Section(name="summary", title="Did it pay?", blocks=tuple(blocks))


_STARTS = {
    "yes": "Yes.",
    "no": "No.",
    "within two standard errors": "That was not shown.",
    "one seed": "One seed cannot tell.",
    "cannot be told": "That cannot be told.",
}
_OPEN = ("one seed", "cannot be told")


def _answer(study: Study, pairs: Sequence[Pair]) -> str:
    """Return the best result in a few sentences; a clear yes or no needs several seeds.

    A clear yes goes before a better result that is open. Models that diverged are in no result, and there
    must be a pair without one.
    """
    sound = [pair for pair in pairs if not pair.diverged]
    whole = [pair for pair in sound if not any(run.unfinished for run in pair.group.runs)]
    hardest = [min(of_one, key=_dense_loss) for of_one in _by_group(whole or sound)]
    first = min(hardest, key=_gap)
    best = min((pair for pair in hardest if pair.paid == "yes"), key=_gap, default=first)
    unit = formats.unit(best.group.runs[0].about.task)
    which = "the best of the Mixtures of Experts" if best is first else "one of the Mixtures of Experts"
    which = "the Mixture of Experts" if len(_by_group(pairs)) == 1 else which
    others = sum(pair.group is best.group for pair in pairs) - 1
    dense = "the dense model that was trained on"
    dense = f"the best of the dense models that were trained on, {best.against.label}" if others else dense
    said = (
        f"{_STARTS[best.paid]} At equal training FLOPs {which} ({best.group.label}) is "
        f"{_how_far(best, unit)} {dense} ({_seeds(best)}{_between(best)})."
    )
    if best.paid == "one seed":
        said = f"{said} {_on_documents(study, best) or _HINT}"
    other = _beside(best, hardest)
    if other is None:
        return said
    same = (
        "the same dense model" if other.against is best.against else f"the dense model {other.against.label}"
    )
    return f"{said} {other.group.label} is {_how_far(other, unit)} {same} ({_seeds(other)})."


def _by_group(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Return the pairs of each Mixture of Experts."""
    together: dict[int, list[Pair]] = {}
    for pair in pairs:
        together.setdefault(id(pair.group), []).append(pair)
    return [*together.values()]


def _beside(best: Pair, pairs: Sequence[Pair]) -> Pair | None:
    """Return the pair to name after `best`: a better one, or if `best` is open, one that is not."""
    better = [pair for pair in pairs if _gap(pair) < _gap(best)]
    settled = [pair for pair in pairs if best.paid in _OPEN and pair.paid not in _OPEN]
    return min(better or settled, key=_gap, default=None)


def _seeds(pair: Pair) -> str:
    """Return how many seeds both have, in words."""
    seeds = min(len(pair.group.runs), len(pair.against.runs))
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def _gap(pair: Pair) -> float:
    """Return twice the middle of the difference at the end; the lower, the better the Mixture of Experts."""
    return (pair.standing.high or 0.0) + (pair.standing.low or 0.0)


def _dense_loss(pair: Pair) -> float:
    """Return the loss of the dense model where the pair is compared, the middle of its bounds.

    The lowest asks the most of a Mixture of Experts, also if its model ended earlier, after fewer FLOPs.
    """
    return sum(measured(pair.against, pair.against.loss.value, pair.standing.end or 0.0)) / 2


_HINT = (
    "Train more seeds, or export both and score them on the same held-out text with `upcycle eval`: paired "
    "differences come with a standard error."
)


def _how_far(pair: Pair, unit: str) -> str:
    """Return words such as `0.0100 ± 0.0020 nats per token ahead of`, or an interval."""
    low, high = pair.standing.low or 0.0, pair.standing.high or 0.0
    error = "" if pair.error is None else f" ± {pair.error:.4f}"
    least, most = sorted((abs(low), abs(high)))
    where = "behind" if low > 0 else "ahead of"
    if low <= 0 <= high and f"{low:.4f}" != f"{high:.4f}":
        return f"between {abs(low):.4f} {unit} ahead of and {high:.4f} behind"
    near = f"{least:.4f}" == f"{most:.4f}"
    return f"{f'{most:.4f}' if near else f'{least:.4f} to {most:.4f}'}{error} {unit} {where}"


def _between(pair: Pair) -> str:
    """Say which evaluations bound the end, if one of the two curves has none there."""
    if pair.standing.between is None:
        return ""
    first, last = map(formats.flops, pair.standing.between)
    end = formats.flops(pair.standing.end)
    return f"; at {end} FLOPs one of them was not evaluated, but at {first} and {last}"


def _on_documents(study: Study, pair: Pair) -> str:
    """Return a sentence on the scores of both exports on the same documents; empty if there are none."""
    ours, theirs = (_exports(study, group) for group in (pair.group, pair.against))
    for (spent, mine), (theirs_spent, other) in product(ours, theirs):
        if mine.variant != other.variant:  # a mean of checkpoints is another model than the last of them
            continue
        matching = {score.question: score for score in other.scores if score.sums is not None}
        for score in mine.scores:
            match = matching.get(score.question)
            if score.sums is None or match is None or match.sums is None or score.units != match.units:
                continue
            found = difference(score.sums, match.sums)
            if found.standard_error is None:
                continue
            better = (found.value > 0) == score.higher_is_better
            shown = abs(found.value) > 2 * found.standard_error
            where = ("ahead" if better else "behind") if shown else "not to be told apart"
            variant = f"{mine.variant} of both, " if mine.variant else ""
            others = formats.flops(theirs_spent)
            return (
                f"On the same {found.count:,} {found.units} of {score.name} it is {where}, by "
                f"{formats.signed(found.value, found.standard_error)} {score.metric.replace('_', ' ')} "
                f"({variant}after {formats.flops(spent)} FLOPs, the dense model after {others}); "
                f"other seeds may differ."
            )
    return ""


def _exports(study: Study, group: Group) -> list[tuple[float, CheckpointRecord]]:
    """Return the checkpoints exported from runs of a group with their training FLOPs, longest first."""
    out = []
    for checkpoint in study.checkpoints:
        owner = study.comparison.owner(checkpoint)
        if owner is not None and owner[0] is group and checkpoint.training is not None:
            out.append((float(owner[1].flops(np.array(float(checkpoint.training.tokens)))), checkpoint))
    return sorted(out, key=lambda found: -found[0])


def _table(pairs: Sequence[Pair]) -> Table:
    rows = []
    for pair in pairs:
        end = pair.standing.end or 0.0
        losses = (_range(*measured(group, group.loss.value, end)) for group in (pair.group, pair.against))
        rows.append(
            (
                pair.group.label,
                pair.against.label,
                pair.paid,
                formats.flops(end),
                *losses,
                difference_of(pair),
            )
        )
    return Table(
        caption="Held-out loss at equal training FLOPs",
        head=("model", "against", "paid", "at FLOPs", "its loss", "loss of the other", "difference"),
        rows=tuple(rows),
        left=3,
        note="At the most FLOPs of their own training that both have spent. A loss that was not evaluated "
        "there lies between those of the evaluations on either side, and is shown from one to the other. One "
        "standard error over seeds; what is called paid is ahead by two of them wherever it lies. A model "
        "that diverged has not paid, and is nothing to be ahead of; its numbers are those before.",
    )


def _range(low: float, high: float) -> str:
    one, two = formats.loss(low), formats.loss(high)
    return one if one == two else f"{one} to {two}"


def _diverged(own: Sequence[Pair]) -> str:
    """Say that all models of one side diverged; empty if they did not. `own` are the pairs of one source."""
    experts = [of_one[0].group for of_one in _by_group(own)]
    if own and all(group.diverged for group in experts):
        which = "The Mixture of Experts" if len(experts) == 1 else "Every Mixture of Experts"
        return f"No. {which} diverged: {_no_loss(experts)}."
    dense = list({id(pair.against): pair.against for pair in own}.values())
    if own and all(group.diverged for group in dense):
        which = "The dense model" if len(dense) == 1 else "Every dense model"
        return (
            f"That cannot be told. {which} that was trained on diverged, so there is nothing to compare "
            f"with: {_no_loss(dense)}."
        )
    return ""


def _no_loss(groups: Sequence[Group]) -> str:
    labels = "; ".join(group.label for group in groups)
    return f"the last held-out loss of {labels} is not a finite number"


def _nothing(study: Study, asked: Sequence[Pair]) -> str:
    """Say why there is no answer; `asked` are the pairs with a dense model that was trained on."""
    upcycled = [group for group in study.groups if group.kind == "upcycled" and group.tokens.size]
    if not upcycled:
        return "No run of an upcycled model with a held-out loss was given, so there is nothing to answer."
    if all(group.grown for group in upcycled):
        return (
            "The runs are of models that grew out of a Mixture of Experts, which `upcycle train` does not "
            "train without [grow], so there is no model to compare them with."
        )
    if not any(group.kind == "dense, continued" and group.tokens.size for group in study.groups):
        return (
            "No run that continues the dense model was given: train one without [moe] from the same source "
            "to see whether upcycling paid."
        )
    if all(pair.other_source for pair in asked):
        return (
            "No run continues a dense model that a Mixture of Experts here was made from, so there is "
            "nothing to compare: train one without [moe] from the same source to see whether upcycling paid."
        )
    return "The runs have no training FLOPs in common at which they could be compared."


def _unanswered(asked: Sequence[Pair]) -> list[str]:
    """Name each Mixture of Experts whose own source no run continues."""
    return [
        f"{group.label} is in no row: {_why_unanswered(group)}."
        for group in (of_one[0].group for of_one in _by_group(asked) if all(p.other_source for p in of_one))
    ]


def _why_unanswered(group: Group) -> str:
    if group.grown:
        return "it grew out of a Mixture of Experts, and no dense model is its baseline"
    return "no run here continues the dense model that it was made from"
