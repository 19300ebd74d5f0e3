"""The section on tasks: the scores that `upcycle eval` wrote beside checkpoints."""

from __future__ import annotations

import json
import math
import textwrap
from functools import partial

import numpy as np

from upcycle.reporting import figures, formats
from upcycle.reporting.document import Block, Picture, Section, Table
from upcycle.reporting.labels import flat
from upcycle.reporting.study import Column, Study

_KINDS = {
    "text": "texts",
    "images": "images",
    "chats": "chats",
    "tasks": "tasks",
    "few_shot": "few-shot probe",
}
_DRAWN = ("accuracy", "acc", "accuracy_norm", "acc_norm")  # shares, which fit on one axis
_MOST = 16  # the most rows of a figure

Question = tuple[str, str, str, str]  # kind, name, data, metric


def section(study: Study) -> Section | None:
    """Return the section; None if no checkpoint was scored."""
    columns = [c for c in study.columns() if any(one.scores for one in c.checkpoints)]
    if not columns:
        return None
    asked = list(dict.fromkeys(s.question for c in columns for one in c.checkpoints for s in one.scores))
    names = _names(asked)
    blocks: list[Block] = _pictures(columns, names)
    for kind in dict.fromkeys(question[0] for question in asked):
        blocks.append(_table(kind, columns, {q: name for q, name in names.items() if q[0] == kind}))
    return Section(name="tasks", title="Tasks", blocks=tuple(blocks))


def _names(asked: list[Question]) -> dict[Question, str]:
    """Return a label for each question: its name, and what differs if it was asked on other data."""
    out = {}
    for question in asked:
        kind, name, data, metric = question
        others = [o for k, n, o, m in asked if (k, n, m) == (kind, name, metric) and o != data]
        own, theirs = dict(flat(json.loads(data))), [dict(flat(json.loads(o))) for o in others]
        telling = [k for k in own if any(own[k] != other.get(k) for other in theirs)]
        said = ", ".join(f"{k or 'data'} {str(own[k])[:12]}" for k in telling[:2])
        out[question] = f"{name} ({said})" if said else name
    return out


def _found(column: Column, question: Question) -> tuple[float, float | None, bool] | None:
    """Return mean, standard error and direction, over several checkpoints or else over examples."""
    last = [{s.question: s for s in checkpoint.scores}.get(question) for checkpoint in column.checkpoints]
    found = [score for score in last if score is not None]
    if not found:
        return None
    values = np.array([s.value for s in found])
    error = found[0].standard_error
    if len(found) > 1:
        error = float(values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()), error, found[0].higher_is_better


def _table(kind: str, columns: list[Column], names: dict[Question, str]) -> Table:
    rows = []
    for question, name in names.items():
        cells = [_found(column, question) for column in columns]
        better = next(cell[2] for cell in cells if cell is not None)
        values = [cell[0] for cell in cells if cell is not None]
        best = (max if better else min)(values)
        shown = [
            formats.MISSING
            if cell is None
            else formats.loss(cell[0], cell[1]) + (" *" if cell[0] == best and len(values) > 1 else "")
            for cell in cells
        ]
        rows.append((name, f"{question[3]} {'↑' if better else '↓'}", *shown))
    return Table(
        caption=f"Scores on {_KINDS.get(kind, kind)}",
        head=("on", "metric", *(column.label for column in columns)),
        rows=tuple(rows),
        left=2,
        note="↑ higher is better, ↓ lower is better, * the best mean of a row; ± is one standard error, over "
        "seeds where several were scored, else over examples.",
    )


def _pictures(columns: list[Column], names: dict[Question, str]) -> list[Block]:
    drawn = [question for question in names if question[3] in _DRAWN]
    plain = [names[question] for question in drawn]
    rows = [
        textwrap.shorten(name if plain.count(name) == 1 else f"{name}, {question[3]}", 28, placeholder="…")
        for question, name in zip(drawn, plain, strict=True)
    ]
    out: list[Block] = []
    for first in range(0, len(drawn), _MOST):
        some = slice(first, first + _MOST)
        series = []
        for column in columns:
            cells = [_found(column, question) for question in drawn[some]]
            values = np.array([math.nan if c is None else c[0] for c in cells])
            errors = np.array([math.nan if c is None or c[1] is None else c[1] for c in cells])
            series.append((column.label, column.place, values, errors))
        part = first // _MOST + 1
        title = "Accuracy of checkpoints" + (f" ({part})" if len(drawn) > _MOST else "")
        draw = partial(figures.dots, title=title, rows=rows[some], series=series, x="share right")
        caption = "Bars are one standard error."
        out.append(Picture(name=f"tasks-{part}", title=title, caption=caption, draw=draw))
    return out
