"""The figure of an experiment as PNG: mean curves with bands of one standard error.

A curve of one seed has no band, because its error is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from upcycle.reporting import drawing, figures
from upcycle.reporting.document import Picture
from upcycle.reporting.figures import Axis, Line

Curves = Mapping[str, Sequence[Sequence[tuple[float, float]]]]  # by label: one curve of (x, y) for each seed


def write(path: Path, title: str, curves: Curves, x: str, y: str, *, counted: str | None = None) -> None:
    """Draw `curves` to `path`; `counted` as in `figures.Axis`."""
    lines = []
    for place, (label, seeds) in enumerate(curves.items()):
        points = np.array(seeds, np.float64)  # [seeds, n, 2]
        values = points[..., 1]
        error = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
        mean = values.mean(0)
        lines.append(
            Line(
                label=label.replace("_", " "),
                place=place,
                x=points[0, :, 0],
                y=mean,
                low=None if error is None else mean - error,
                high=None if error is None else mean + error,
            )
        )
    draw = partial(
        figures.curves, title=title, lines=lines, x=Axis(label=x, counted=counted), y=Axis(label=y)
    )
    path.write_bytes(drawing.png(Picture(name="figure", title=title, caption="", draw=draw)))
