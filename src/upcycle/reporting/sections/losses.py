"""The section on held-out loss and accuracy over tokens and FLOPs: curves, crossings, cost of the start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from upcycle.reporting import figures, formats
from upcycle.reporting.comparison import Group, Mean, Pair, difference_of
from upcycle.reporting.crossing import Crossing, Standing
from upcycle.reporting.document import Block, Picture, Section, Sentence, Table
from upcycle.reporting.figures import Axis, Line, Mark
from upcycle.reporting.study import Study

_TOKENS = Axis(label="tokens trained on", counted="named")
_FLOPS = Axis(label="training FLOPs", counted="power")
_WHOLE = Axis(label="training FLOPs, start included", counted="power")


@dataclass(frozen=True, kw_only=True)
class _View:
    """The groups along one axis, with their shifts and the crossings of pairs."""

    name: str
    title: str
    axis: Axis
    x: Sequence[tuple[Group, np.ndarray]]
    crossings: Sequence[tuple[Pair, Crossing]]
    caption: str


def section(study: Study) -> Section | None:
    """Return the section; None if no run was evaluated."""
    groups = [g for g in study.groups if g.tokens.size]
    if not groups:
        return None
    unit = formats.unit(groups[0].runs[0].about.task)
    places = {g.label: i for i, g in enumerate(study.groups)}
    views = [*_with_near(_views(groups, study.comparison.pairs))]
    blocks: list[Block] = []
    for view in views:
        blocks.append(_picture(view, places, "loss", unit))
    if all(np.isfinite(g.accuracy.value).all() for g in groups):
        blocks += [_picture(view, places, "accuracy", "share right") for view in views]
    blocks += [_ends(groups, unit)]
    if study.comparison.pairs:
        blocks.append(_crossings(study.comparison.pairs, unit))
    blocks += _starts(groups)
    return Section(name="loss", title="Loss against tokens and FLOPs", blocks=tuple(blocks))


def _views(groups: Sequence[Group], pairs: Sequence[Pair]) -> list[_View]:
    band = " Bands are one standard error over seeds." if any(len(g.runs) > 1 for g in groups) else ""
    views = [
        _View(
            name="tokens",
            title="tokens",
            axis=_TOKENS,
            x=[(g, g.tokens) for g in groups],
            crossings=[(p, p.tokens) for p in pairs],
            caption=f"On held-out rows, after so many tokens of each run's own training.{band}",
        ),
        _View(
            name="flops",
            title="FLOPs",
            axis=_FLOPS,
            x=[(g, g.flops) for g in groups],
            crossings=[(p, p.flops) for p in pairs],
            caption="After so many FLOPs of each run's own training: the cost of the dense start is "
            f"excluded.{band}",
        ),
    ]
    known = [(g, g.flops + g.start.flops) for g in groups if g.start.flops is not None]
    if any(g.start.flops for g, _ in known):
        missing = [g.label for g in groups if g.start.flops is None]
        left = f" Left out, because their start's cost is not known: {', '.join(missing)}." if missing else ""
        views.append(
            _View(
                name="flops-with-start",
                title="FLOPs, start included",
                axis=_WHOLE,
                x=known,
                crossings=[(p, p.with_start) for p in pairs if p.with_start is not None],
                caption=f"The same, with the FLOPs that had made the dense start included.{left}{band}",
            )
        )
    return views


def _with_near(views: Sequence[_View]) -> Iterator[_View]:
    """Yield each view, and an enlarged one without the runs from scratch, if there are any.

    Runs from scratch are far above the others, and often far longer.
    """
    for view in views:
        yield view
        near = [(group, x) for group, x in view.x if "from scratch" not in group.kind]
        if 1 < len(near) < len(view.x):
            yield replace(
                view,
                name=f"{view.name}-near",
                title=f"{view.title}, enlarged",
                x=near,
                caption="The same without the runs from scratch.",
            )


def _picture(view: _View, places: dict[str, int], what: str, unit: str) -> Picture:
    lines = [_line(group, x, places[group.label], getattr(group, what)) for group, x in view.x]
    marks = []
    for pair, found in view.crossings:
        continued = pair.against.kind == "dense, continued" and not pair.other_source
        if what == "loss" and found.verdict == "crosses" and continued and not pair.diverged:
            x = next((x for g, x in view.x if g is pair.group), None)
            if x is None:
                continue
            assert found.x is not None
            y_there = float(np.interp(found.x, x, pair.group.loss.value))
            place = places[pair.group.label]
            marks.append(Mark(x=found.x, y=y_there, text="crossing", place=place))
    values = np.concatenate([line.y for line in lines])
    y = Axis(label=f"held-out {what} ({unit})", log=what == "loss" and bool(values.max() > 2 * values.min()))
    title = f"{what.capitalize()} against {view.title}"
    return Picture(
        name=f"{what}-{view.name}",
        title=title,
        caption=view.caption,
        draw=partial(figures.curves, title=title, lines=lines, x=view.axis, y=y, marks=marks),
    )


def _line(group: Group, x: np.ndarray, place: int, mean: Mean) -> Line:
    y, error = mean.value, mean.error
    return Line(
        label=group.label,
        place=place,
        x=x,
        y=y,
        low=None if error is None else y - error,
        high=None if error is None else y + error,
    )


def _ends(groups: Sequence[Group], unit: str) -> Table:
    rows = []
    for group in groups:
        errors = (group.loss.error, group.accuracy.error)
        loss, accuracy = (None if e is None else float(e[-1]) for e in errors)
        started = group.tokens[0] == 0
        rows.append(
            (
                group.label,
                str(len(group.runs)),
                formats.count(float(group.tokens[-1])),
                formats.flops(float(group.flops[-1])),
                formats.flops(
                    None if group.start.flops is None else float(group.flops[-1]) + group.start.flops
                ),
                formats.loss(float(group.loss.value[0])) if started else formats.MISSING,
                formats.loss(float(group.loss.value[-1]), loss),
                formats.percent(float(group.accuracy.value[-1]), accuracy),
            )
        )
    return Table(
        caption="Where the runs ended",
        head=(
            "model", "seeds", "tokens", "FLOPs", "FLOPs, start included", "loss before", "loss after",
            "accuracy after",
        ),
        rows=tuple(rows),
        note=f"Losses are held-out, in {unit}; ± is one standard error over seeds, if there are several.",
    )  # fmt: skip


def _crossings(pairs: Sequence[Pair], unit: str) -> Table:
    rows = [
        (
            pair.group.label,
            pair.against.label + (" (of another source)" if pair.other_source else ""),
            _where(pair, pair.standing_by_tokens, formats.count),
            _where(pair, pair.standing, formats.flops),
            _where(pair, pair.standing_with_start, formats.flops),
            difference_of(pair),
        )
        for pair in pairs
    ]
    return Table(
        caption="Where the Mixture of Experts comes below, to stay",
        head=(
            "model", "against", "tokens", "FLOPs, start excluded", "FLOPs, start included",
            "difference at equal FLOPs",
        ),
        rows=tuple(rows),
        left=2,
        note="By the evaluations alone, on means over seeds: not before the first number, and by the second "
        "at the latest; figures draw straight lines and mark where those cross. None: not below at the end. "
        "None that lasts: below for a while, above at the end. Cannot be told: evaluations beside the end "
        "lie too far apart. Diverged: one of the two did, so nothing stays. The difference is that of "
        f"held-out losses ({unit}) at the most FLOPs, start excluded, that both have spent; negative: the "
        "Mixture of Experts is ahead.",
    )  # fmt: skip


def _where(pair: Pair, found: Standing | None, number: Callable[[float], str]) -> str:
    if found is None:
        return "not known"
    if pair.diverged:
        return "diverged"
    if found.since is None:
        return {"above": "none that lasts" if found.lost_again else "none", "apart": "no overlap"}.get(
            found.sign, found.sign
        )
    after, by = found.since
    if after is None:
        return f"never above; by {number(by)}"
    return f"{number(after)} to {number(by)}"


def _starts(groups: Sequence[Group]) -> list[Block]:
    rows = tuple(
        (
            group.label,
            group.start.why,
            formats.MISSING if group.start.tokens is None else formats.count(group.start.tokens),
            formats.flops(group.start.flops),
        )
        for group in groups
    )
    table = Table(
        caption="The cost of the start",
        head=("model", "what is known of its start", "tokens", "training FLOPs"),
        rows=rows,
        left=2,
    )
    if all(g.start.flops is not None and math.isfinite(g.start.flops) for g in groups):
        return [table]
    hint = (
        "Where the cost of a start is not known, curves and crossings with the start included are left out; "
        "--dense-flops and --dense-tokens tell what the dense checkpoint had cost."
    )
    return [table, Sentence(text=hint, tone="small")]
