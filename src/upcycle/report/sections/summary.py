"""What came out: one sentence and a table, and what is wrong with what was given."""

from __future__ import annotations

from collections.abc import Sequence

from upcycle.report import formats
from upcycle.report.comparison import Pair, at
from upcycle.report.document import Block, Section, Sentence, Table
from upcycle.report.study import Study


def section(study: Study) -> Section:
    """The head of the report."""
    # The dense continuation is the question; the other pairs stand in the table of crossings.
    pairs = [
        pair
        for pair in study.comparison.pairs
        if pair.group.kind == "upcycled"
        and pair.against.kind == "dense, continued"
        and pair.flops.end is not None
    ]
    blocks: list[Block] = [Sentence(text=_answer(pairs))] if pairs else [Sentence(text=_nothing(study))]
    if pairs:
        blocks.append(_table(pairs))
    blocks += [Sentence(text=trouble, tone="warning") for trouble in study.troubles()]
    return Section(name="summary", title="Did it pay?", blocks=tuple(blocks))


def _answer(pairs: Sequence[Pair]) -> str:
    """The best of them in a sentence."""
    whole = [pair for pair in pairs if not any(run.unfinished for run in pair.group.runs)]
    best = min(whole or pairs, key=lambda pair: pair.flops.gap or 0.0)
    unit, gap = formats.unit(best.group.runs[0].about["task"]), best.flops.gap or 0.0
    error = "" if best.error is None else f" ± {best.error:.4f}"
    seeds = min(len(best.group.runs), len(best.against.runs))
    counted = "one seed" if seeds == 1 else f"{seeds} seeds"
    start = {"yes": "Yes.", "no": "No."}.get(_paid(best), "That was not shown.")
    which = "the Mixture of Experts" if len(pairs) == 1 else "the best of the Mixtures of Experts"
    return (
        f"{start} At equal training FLOPs {which} ({best.group.label}) is {abs(gap):.4f}{error} {unit} "
        f"{'behind' if gap > 0 else 'ahead of'} the dense model that was trained on ({counted})."
    )


def _paid(pair: Pair) -> str:
    gap = pair.flops.gap or 0.0
    if pair.error is not None and abs(gap) < 2 * pair.error:
        return "within two standard errors"
    return "yes" if gap < 0 else "no"


def _table(pairs: Sequence[Pair]) -> Table:
    rows = []
    for pair in pairs:
        end = pair.flops.end or 0.0
        rows.append(
            (
                pair.group.label,
                pair.against.label,
                f"{_paid(pair)}{' (one seed)' if pair.error is None else ''}",
                formats.flops(end),
                formats.loss(at(pair.group, pair.group.loss, end)),
                formats.loss(at(pair.against, pair.against.loss, end)),
                formats.signed(pair.flops.gap or 0.0, pair.error),
            )
        )
    return Table(
        caption="Held-out loss at equal training FLOPs",
        head=("model", "against", "paid", "at FLOPs", "its loss", "loss of the other", "difference"),
        rows=tuple(rows),
        left=3,
        note="At the most FLOPs of their own training that both have spent; between evaluated points on a "
        "straight line. One standard error over seeds; what is called paid is ahead by two.",
    )


def _nothing(study: Study) -> str:
    if not any(group.kind == "upcycled" and group.tokens.size for group in study.groups):
        return "No run of an upcycled model with a held-out loss was given, so there is nothing to answer."
    if not any(group.kind == "dense, continued" and group.tokens.size for group in study.groups):
        return (
            "No run that continues the dense model was given: train one without [moe] from the same source "
            "to see whether upcycling paid."
        )
    return "The runs have no training FLOPs in common at which they could be compared."
