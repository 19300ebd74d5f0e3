"""The section on the similarity of experts, to each other and to the dense network they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from upcycle.reporting import figures, formats
from upcycle.reporting.checkpoints import CheckpointRecord
from upcycle.reporting.document import Block, Picture, Section, Table
from upcycle.reporting.figures import Axis, Line
from upcycle.reporting.runs import place_of
from upcycle.reporting.study import Study


def section(study: Study) -> Section | None:
    """Return the section; None if no checkpoint has experts."""
    shown = [(c.place, c.label, c.checkpoints[0]) for c in study.columns() if c.checkpoints[0].anatomy]
    if not shown:
        return None
    blocks: list[Block] = [*pictures(shown), _table(shown)]
    return Section(name="similarity", title="Similarity of experts", blocks=tuple(blocks))


Shown = list[tuple[int, str, CheckpointRecord]]


def pictures(shown: Shown) -> list[Picture]:
    """Return the figures for checkpoints with experts, given with number and label."""
    out = [_picture("between", "Experts to each other", _between, shown)]
    if any(_to_dense(layer) for _, _, checkpoint in shown for layer in _layers(checkpoint)):
        out.append(_picture("dense", "Experts to the dense network", _to_dense, shown))
    return out


def _layers(checkpoint: CheckpointRecord) -> list[Mapping[str, Any]]:
    return [layer for layer in (checkpoint.anatomy or {})["layers"] if layer["num_experts"]]


def _between(layer: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Return the mean, the minimum and the maximum cosine of all pairs of experts."""
    found = layer["cosine_between"]
    return None if found is None else (found["mean"], found["min"], found["max"])


def _to_dense(layer: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Return the mean, the minimum and the maximum cosine of experts and the dense network."""
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
        for layer in _layers(checkpoint):
            between, dense = _between(layer), _to_dense(layer)
            began = layer.get("cosine_between_at_start")
            rows.append(
                (
                    label,
                    place_of(layer.get("stack", "layers"), layer["layer"]),
                    str(layer["num_experts"]),
                    str(layer["width"]),
                    formats.MISSING if between is None else f"{between[0]:.4f}",
                    formats.MISSING if between is None else f"{between[1]:.4f} to {between[2]:.4f}",
                    formats.MISSING if dense is None else f"{dense[0]:.4f}",
                    formats.MISSING if began is None else f"{began['mean']:.4f}",
                )
            )
    head: tuple[str, ...] = (
        "model", "layer", "experts", "width", "to each other", "least to most", "to dense",
        "to each other, at the start",
    )  # fmt: skip
    if all(row[-1] == formats.MISSING for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    notes = dict.fromkeys(n for _, _, c in shown for n in (c.anatomy or {})["notes"])
    return Table(
        caption="Cosine similarity of experts",
        head=head,
        rows=tuple(rows),
        left=2,
        note=" ".join(f"{note}." for note in notes),
    )
