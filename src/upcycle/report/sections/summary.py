"""What came out, in sentences, and what is wrong with what was given."""

from __future__ import annotations

from upcycle.report import formats
from upcycle.report.comparison import Pair, at
from upcycle.report.document import Section, Sentence
from upcycle.report.study import Study


def section(study: Study) -> Section:
    """The head of the report."""
    blocks = [Sentence(text=_verdict(pair)) for pair in study.comparison.pairs if _tells(pair)]
    if not blocks:
        blocks = [Sentence(text=_nothing(study))]
    blocks += [Sentence(text=trouble, tone="warning") for trouble in study.troubles()]
    return Section(name="summary", title="Did it pay?", blocks=tuple(blocks))


def _tells(pair: Pair) -> bool:
    """The dense continuation is the question; the other pairs stand in the table of crossings."""
    return pair.against.kind == "dense, continued" and pair.flops.end is not None


def _verdict(pair: Pair) -> str:
    end, gap = pair.flops.end, pair.flops.gap
    assert end is not None
    assert gap is not None
    ours, theirs = (at(g, g.loss, end) for g in (pair.group, pair.against))
    unit = formats.unit(pair.group.runs[0].about["task"])
    error = "" if pair.error is None else f" ± {pair.error:.4f}"
    word = "behind" if gap > 0 else "ahead"
    sure = ""
    if pair.error is not None and abs(gap) < 2 * pair.error:
        sure = " That is within two standard errors: no difference was shown."
    seeds = min(len(pair.group.runs), len(pair.against.runs))
    counted = "one seed" if seeds == 1 else f"{seeds} seeds"
    return (
        f"At equal training FLOPs ({formats.flops(end)}) {pair.group.label} has a held-out loss of {ours:.4f} "
        f"{unit}, {pair.against.label} {theirs:.4f}: the Mixture of Experts is {abs(gap):.4f}{error} {word} "
        f"({counted}). {crossing_sentence(pair)}{sure}"
    )


def crossing_sentence(pair: Pair) -> str:
    """Where it comes below, in words."""
    found = pair.flops
    if found.verdict == "crosses" and found.x is not None:
        return f"It comes below at {formats.flops(found.x)} FLOPs and stays there."
    return {
        "from the start": "It is never above.",
        "none": "There is no crossing within the runs.",
        "back above": "It is below for a while and above at the end: no crossing that lasts within the runs.",
    }.get(found.verdict, "The two have no FLOPs in common.")


def _nothing(study: Study) -> str:
    kinds = {group.kind for group in study.groups if group.tokens.size}
    if not any(group.has_experts for group in study.groups):
        return "No run of a Mixture of Experts with a held-out loss was given, so there is nothing to answer."
    if "dense, continued" not in kinds:
        return (
            "No run that continues the dense model was given: train one without [moe] from the same source "
            "to see whether upcycling paid."
        )
    return "The runs have no training FLOPs in common at which they could be compared."
