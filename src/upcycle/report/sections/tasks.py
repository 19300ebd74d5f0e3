"""How checkpoints score on tasks: what `upcycle eval` wrote beside them."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from upcycle.report import figures, formats
from upcycle.report.document import Block, Picture, Section, Table
from upcycle.report.records import Score
from upcycle.report.study import Column, Study

_KINDS = {"text": "texts", "images": "images", "tasks": "tasks", "few_shot": "few-shot probe"}
_DRAWN = ("accuracy", "acc", "accuracy_norm", "acc_norm")  # shares, that can stand on one axis
_MOST = 16  # rows of a figure

Key = tuple[str, str, str]  # kind, name, metric


def section(study: Study) -> Section | None:
    """Nothing where no checkpoint was scored."""
    columns = [c for c in study.columns() if any(one.scores for one in c.checkpoints)]
    if not columns:
        return None
    keys = list(dict.fromkeys((s.kind, s.name, s.metric) for c in columns for s in _scores(c)))
    blocks: list[Block] = _pictures(columns, keys)
    for kind in dict.fromkeys(key[0] for key in keys):
        blocks.append(_table(kind, columns, [key for key in keys if key[0] == kind]))
    return Section(name="tasks", title="Tasks", blocks=tuple(blocks))


def _scores(column: Column) -> list[Score]:
    return [score for checkpoint in column.checkpoints for score in checkpoint.scores]


def _found(column: Column, key: Key) -> tuple[float, float | None, bool] | None:
    """Mean, standard error and direction: over checkpoints where several were scored, else over examples."""
    found = [s for s in _scores(column) if (s.kind, s.name, s.metric) == key]
    if not found:
        return None
    values = np.array([s.value for s in found])
    error = found[0].standard_error
    if len(found) > 1:
        error = float(values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()), error, found[0].higher_is_better


def _table(kind: str, columns: list[Column], keys: list[Key]) -> Table:
    rows = []
    for key in keys:
        cells = [_found(column, key) for column in columns]
        better = next(cell[2] for cell in cells if cell is not None)
        values = [cell[0] for cell in cells if cell is not None]
        best = (max if better else min)(values)
        shown = [
            formats.MISSING
            if cell is None
            else formats.loss(cell[0], cell[1]) + (" *" if cell[0] == best and len(values) > 1 else "")
            for cell in cells
        ]
        rows.append((key[1], f"{key[2]} {'↑' if better else '↓'}", *shown))
    return Table(
        caption=f"Scores on {_KINDS.get(kind, kind)}",
        head=("on", "metric", *(column.label for column in columns)),
        rows=tuple(rows),
        left=2,
        note="↑ higher is better, ↓ lower is better, * the best mean of a row; ± is one standard error, over "
        "seeds where several were scored, else over examples.",
    )


def _pictures(columns: list[Column], keys: list[Key]) -> list[Block]:
    drawn = [key for key in keys if key[2] in _DRAWN]
    names = [key[1] for key in drawn]
    rows = [
        name if names.count(name) == 1 else f"{name}, {key[2]}"
        for key, name in zip(drawn, names, strict=True)
    ]
    out: list[Block] = []
    for first in range(0, len(drawn), _MOST):
        some = drawn[first : first + _MOST]
        series = []
        for column in columns:
            cells = [_found(column, key) for key in some]
            values = np.array([math.nan if c is None else c[0] for c in cells])
            errors = np.array([math.nan if c is None or c[1] is None else c[1] for c in cells])
            series.append((column.label, column.place, values, errors))
        title = "Accuracy of checkpoints" + (f" ({first // _MOST + 1})" if len(drawn) > _MOST else "")
        draw = partial(
            figures.dots, title=title, rows=rows[first : first + _MOST], series=series, x="share right"
        )
        caption = "Bars are one standard error."
        out.append(Picture(name=f"tasks-{first // _MOST + 1}", title=title, caption=caption, draw=draw))
    return out
