"""The figures of an experiment as PNG: curves with bands, points with error bars, and panels side by side.

Bands and bars are one standard error wide on each side. A curve of one seed has none, because its error is
unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from upcycle.reporting import drawing, figures
from upcycle.reporting.document import Picture
from upcycle.reporting.figures import Axis, Line
from upcycle.reporting.inks import Inks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = Mapping[str, Sequence[Sequence[tuple[float, float]]]]  # by label: one curve of (x, y) for each seed
Points = Mapping[str, Sequence[tuple[float, float, float | None]]]  # by label: (x, mean, standard error)
Panels = Mapping[str, tuple[str, Curves]]  # by title: the label of the x axis, and curves
Places = Mapping[str, int]  # by label: the place among the series, as in `Line`


def write(
    path: Path,
    title: str,
    curves: Curves,
    x: str,
    y: str,
    *,
    counted: str | None = None,
    places: Places | None = None,
) -> None:
    """Draw `curves` to `path`, without `places` in their order; `counted` as in `figures.Axis`."""
    lines = lines_of(curves, places or in_order(curves))
    across, up = Axis(label=x, counted=counted), Axis(label=y)
    _save(path, title, partial(figures.curves, title=title, lines=lines, x=across, y=up))


def write_points(path: Path, title: str, points: Points, x: str, y: str, places: Places) -> None:
    """Draw means with error bars to `path`, over a logarithmic axis that has a tick at each x."""
    _save(path, title, partial(_with_bars, title=title, points=points, x=x, y=y, places=places))


def write_panels(path: Path, title: str, panels: Panels, y: str, places: Places) -> None:
    """Draw panels side by side to `path`, with one y axis and one legend."""
    _save(path, title, partial(_side_by_side, panels=panels, y=y, places=places))


def in_order(labels: Mapping[str, object]) -> Places:
    """Return the places of labels that have none of their own."""
    return {label: place for place, label in enumerate(labels)}


def lines_of(curves: Curves, places: Places) -> list[Line]:
    """Return the mean curves with their bands."""
    lines = []
    for label, seeds in curves.items():
        points = np.array(seeds, np.float64)  # [seeds, n, 2]
        values = points[..., 1]
        error = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
        mean = values.mean(0)
        lines.append(
            Line(
                label=_spelled(label),
                place=places[label],
                x=points[0, :, 0],
                y=mean,
                low=None if error is None else mean - error,
                high=None if error is None else mean + error,
            )
        )
    return lines


def _with_bars(inks: Inks, title: str, points: Points, x: str, y: str, places: Places) -> Figure:
    from matplotlib.ticker import NullLocator

    columns = {label: np.array(of, np.float64).T for label, of in points.items()}  # an unknown error is NaN
    lines = [
        Line(label=_spelled(label), place=places[label], x=at, y=mean)
        for label, (at, mean, _) in columns.items()
    ]
    made = figures.curves(inks, title, lines, Axis(label=x), Axis(label=y))
    (axes,) = made.axes
    for (at, mean, error), drawn in zip(columns.values(), axes.get_lines(), strict=True):
        axes.errorbar(at, mean, yerr=np.nan_to_num(error), fmt="none", ecolor=drawn.get_color(), capsize=3)
    axes.set_xscale("log")
    ticks = sorted({float(at) for of in columns.values() for at in of[0]})
    axes.set_xticks(ticks, labels=[f"{at:g}" for at in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    return made


def _side_by_side(inks: Inks, panels: Panels, y: str, places: Places) -> Figure:
    from matplotlib.figure import Figure

    size = (figures.WIDTH * len(panels) * 0.85, figures.HEIGHT + 0.4)
    made = Figure(figsize=size, layout="constrained")
    every = made.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    shown = {}
    for axes, (title, (x, curves)) in zip(every, panels.items(), strict=True):
        figures.frame(axes, inks, title)
        axes.set_xlabel(x)
        for line in lines_of(curves, places):
            shown[line.label] = figures.draw_line(axes, inks, line)
    every[0].set_ylabel(y)
    made.legend(
        [*shown.values()], [*shown],
        loc="outside lower left", ncols=len(shown), frameon=False, fontsize=9, labelcolor=inks.ink,
        handlelength=3.2,
    )  # fmt: skip
    return made


def _spelled(label: str) -> str:
    return label.replace("_", " ")


def _save(path: Path, title: str, draw: Callable[[Inks], Figure]) -> None:
    path.write_bytes(drawing.png(Picture(name="figure", title=title, caption="", draw=draw)))
