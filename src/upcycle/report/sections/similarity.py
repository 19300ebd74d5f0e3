"""How alike the experts of checkpoints are, to each other and to the dense network they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from upcycle.report import figures, formats
from upcycle.report.checkpoints import CheckpointRecord
from upcycle.report.document import Block, Picture, Section, Table
from upcycle.report.figures import Axis, Line
from upcycle.report.records import place_of
from upcycle.report.study import Study


def section(study: Study) -> Section | None:
    """Nothing where no checkpoint has experts."""
    shown = [(c.place, c.label, c.checkpoints[0]) for c in study.columns() if c.checkpoints[0].anatomy]
    if not shown:
        return None
    blocks: list[Block] = [_picture("between", "Experts to each other", _between, shown)]
    if any(_to_dense(layer) for _, _, checkpoint in shown for layer in _layers(checkpoint)):
        blocks.append(_picture("dense", "Experts to the dense network", _to_dense, shown))
    blocks.append(_table(shown))
    return Section(name="similarity", title="Similarity of experts", blocks=tuple(blocks))


Shown = list[tuple[int, str, CheckpointRecord]]


def _layers(checkpoint: CheckpointRecord) -> list[Mapping[str, Any]]:
    return [layer for layer in (checkpoint.anatomy or {})["layers"] if layer["num_experts"]]


def _between(layer: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Mean, least and most cosine of all pairs of experts."""
    found = layer["cosine_between"]
    return None if found is None else (found["mean"], found["min"], found["max"])


def _to_dense(layer: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """The same of experts and the dense network."""
    found = layer["cosine_to_dense"]
    return None if not found else (sum(found) / len(found), min(found), max(found))


def _picture(name: str, title: str, of: Any, shown: Shown) -> Picture:
    lines = []
    for place, label, checkpoint in shown:
        rows = [of(layer) or (math.nan,) * 3 for layer in _layers(checkpoint)]
        mean, low, high = np.array(rows).T
        lines.append(
            Line(label=label, place=place, x=np.arange(1.0, len(rows) + 1), y=mean, low=low, high=high)
        )
    return Picture(
        name=f"similarity-{name}",
        title=title,
        caption="Cosine over all matrices of an expert together. Mean; the band goes from least to most.",
        draw=partial(
            figures.curves,
            title=title,
            lines=lines,
            x=Axis(label="MoE layer, in order", whole=True),
            y=Axis(label="cosine"),
        ),
    )


def _table(shown: Shown) -> Table:
    rows: list[tuple[str, ...]] = []
    for _, label, checkpoint in shown:
        inspected = _inspected(checkpoint)
        for layer in _layers(checkpoint):
            between, dense = _between(layer), _to_dense(layer)
            before, now = inspected.get(place_of(layer), (None, None))
            rows.append(
                (
                    label,
                    place_of(layer),
                    str(layer["num_experts"]),
                    str(layer["width"]),
                    formats.MISSING if between is None else f"{between[0]:.4f}",
                    formats.MISSING if between is None else f"{between[1]:.4f} to {between[2]:.4f}",
                    formats.MISSING if dense is None else f"{dense[0]:.4f}",
                    *(formats.MISSING if v is None else f"{v:.4f}" for v in (before, now)),
                )
            )
    head: tuple[str, ...] = (
        "model", "layer", "experts", "width", "to each other", "least to most", "to dense", "at the start",
        "inspected",
    )  # fmt: skip
    if all(row[-2:] == (formats.MISSING,) * 2 for row in rows):
        head, rows = head[:-2], [row[:-2] for row in rows]
    notes = dict.fromkeys(n for _, _, c in shown for n in (c.anatomy or {})["notes"])
    return Table(
        caption="Cosine similarity of experts",
        head=head,
        rows=tuple(rows),
        left=2,
        note=" ".join(f"{note}." for note in notes),
    )


def _inspected(checkpoint: CheckpointRecord) -> dict[str, tuple[float | None, float | None]]:
    """Similarity at the start and now as routing.json has it, by layer."""
    listed = (checkpoint.routing or {}).get("layers")
    rows = [r for r in listed if isinstance(r, dict) and "layer" in r] if isinstance(listed, list) else []
    return {place_of(r): (_mean(r.get("similarity_start")), _mean(r.get("similarity_now"))) for r in rows}


def _mean(value: Any) -> float | None:
    """A number, the `mean` of a table, or the mean of what is off the diagonal of a matrix."""
    if type(value) in (int, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return _mean(value.get("mean"))
    if isinstance(value, list) and value and all(isinstance(r, list) and len(r) == len(value) for r in value):
        apart = [_mean(x) for i, row in enumerate(value) for j, x in enumerate(row) if i != j]
        found = [x for x in apart if x is not None]
        return sum(found) / len(found) if found else None
    return None
