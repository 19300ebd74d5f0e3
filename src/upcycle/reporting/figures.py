"""The figures of a report as matplotlib objects: curves, dots and heat maps, one panel each.

A panel is as wide as a phone shows legibly; a page puts several side by side. The legend is below the panel.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle.reporting.inks import Inks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.1, 2.8  # inches, without the legend
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (8, 3)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_LEVELS = 10  # the number of colours of a heat map
_POWERS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_NAMES = {0: "", 3: "thousands", 6: "millions", 9: "billions", 12: "trillions"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve with its band `low` to `high` [n]; `place` is its number among the series of the report."""

    label: str
    place: int
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    marked: bool = True


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A labelled point on the line of the series `place`."""

    x: float
    y: float
    text: str
    place: int


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The settings of an axis; `counted` numbers are shown in thousands, millions or powers of ten."""

    label: str
    most: float | None = None  # the upper end of the axis; the lower end gets some margin
    counted: str | None = None  # `named` (millions) or `power` (10^12)
    log: bool = False
    whole: bool = False  # True for integers: no ticks between them


def curves(
    inks: Inks, title: str, lines: Sequence[Line], x: Axis, y: Axis, marks: Sequence[Mark] = ()
) -> Figure:
    """Draw lines with bands over an axis of tokens, FLOPs or layers."""
    from matplotlib.ticker import MaxNLocator

    longest = max((float(np.nanmax(np.abs(line.x))) for line in lines if line.x.size), default=1.0)
    exponent = _exponent(longest) if x.counted else 0
    figure, axes = _panel(inks, title, [line.label for line in lines])
    handles = [draw_line(axes, inks, line, 10.0**exponent) for line in lines]
    for number, mark in enumerate(marks):
        at, colour = mark.x / 10.0**exponent, inks.series[mark.place % len(inks.series)]
        axes.axvline(at, color=colour, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.plot([at], [mark.y], marker="o", markersize=9, color=colour, fillstyle="none", linestyle="")
        left = at > 0.7 * longest / 10.0**exponent
        axes.annotate(
            mark.text, (at, 1.0), xycoords=("data", "axes fraction"),
            xytext=(-4 if left else 4, -10 - 11 * number), textcoords="offset points",
            ha="right" if left else "left", color=inks.ink, fontsize=9,
        )  # fmt: skip
    if x.whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(_unit(x, exponent))
    axes.set_ylabel(y.label)
    if y.most is not None:
        least = min(float(np.nanmin(line.y if line.low is None else line.low)) for line in lines)
        axes.set_ylim(min(least - 0.02, y.most - 0.1), y.most)
    if y.log:
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    _legend(figure, inks, handles, [line.label for line in lines])
    return figure


def draw_line(axes: Axes, inks: Inks, line: Line, unit: float = 1.0) -> Any:
    """Draw a line with its band, its x in `unit`, and return what a legend shows of it."""
    colour, scaled = inks.series[line.place % len(inks.series)], line.x / unit
    (handle,) = axes.plot(
        scaled, line.y,
        color=colour,
        linestyle=_DASHES[_turn(line.place)],
        linewidth=1.6,
        marker=_MARKERS[_turn(line.place)] if line.marked else None,
        markersize=4,
        markevery=max(1, line.x.size // 8),
    )  # fmt: skip
    if line.low is not None and line.high is not None:
        axes.fill_between(scaled, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
    return handle


def dots(
    inks: Inks,
    title: str,
    rows: Sequence[str],
    series: Sequence[tuple[str, int, np.ndarray, np.ndarray]],
    x: str,
) -> Figure:
    """Draw values [rows] of several series with error bars [rows], one below another; NaN is left out."""
    figure, axes = _panel(inks, title, [s[0] for s in series], height=1.0 + 0.38 * len(rows))
    handles = []
    offsets = np.linspace(-0.25, 0.25, len(series)) if len(series) > 1 else [0.0]
    for (_, place, values, errors), offset in zip(series, offsets, strict=True):
        handle = axes.errorbar(
            values, np.arange(len(rows)) + offset, xerr=np.nan_to_num(errors),
            fmt=_MARKERS[_turn(place)], color=inks.series[place % len(inks.series)],
            markersize=5, elinewidth=1.2, capsize=2,
        )  # fmt: skip
        handles.append(handle)
    axes.set_yticks(range(len(rows)), labels=rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(x)
    _legend(figure, inks, handles, [s[0] for s in series])
    return figure


def heat_map(
    inks: Inks, title: str, rows: Sequence[str], values: np.ndarray, labels: tuple[str, str, str]
) -> Figure:
    """Draw a heat map of `values` [rows, columns] in `_LEVELS` colours.

    The colours go from 0 to twice the even share or to the largest value. `labels` are those of the columns,
    the rows and the colours.
    """
    import matplotlib
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

    columns = values.shape[1]
    figure, axes = _panel(inks, title, [], height=max(2.2, min(6.0, 1.1 + 0.2 * len(rows))))
    top = max(2.0, math.ceil(2 * float(np.nanmax(values))) / 2)
    colours = matplotlib.colormaps["cividis"].resampled(_LEVELS)
    norm = BoundaryNorm(np.linspace(0, top, _LEVELS + 1), _LEVELS)
    mesh = axes.pcolormesh(
        np.arange(columns + 1) - 0.5, np.arange(len(rows) + 1) - 0.5, values,
        cmap=colours, norm=norm, edgecolors=inks.card, linewidth=0.6 if values.size <= 800 else 0.0,
    )  # fmt: skip
    axes.grid(visible=False)
    axes.invert_yaxis()
    every = math.ceil(len(rows) / 24)
    axes.set_yticks(range(0, len(rows), every), labels=rows[::every])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    bar = figure.colorbar(mesh, ax=axes, ticks=np.linspace(0, top, 6), format="%.2g", fraction=0.06)
    bar.set_label(labels[2], color=inks.ink)
    bar.ax.tick_params(colors=inks.ink, labelsize=9)
    bar.outline.set_edgecolor(inks.rule)
    return figure


def patches(inks: Inks, title: str, pixels: np.ndarray) -> Figure:
    """Draw rows of small images [E, n, C, height, width], one row for each expert.

    The colours are stretched over the common range of all images.
    """
    experts, count, _, height, width = pixels.shape
    low, high = float(pixels.min()), float(pixels.max())
    shown = ((pixels - low) / max(high - low, 1e-9)).transpose(0, 3, 1, 4, 2)  # [E, height, n, width, C]
    framed = np.ones((experts, height + 1, count, width + 1, shown.shape[-1]))
    framed[:, :height, :, :width] = shown
    figure, axes = _panel(inks, title, [], height=max(1.6, min(8.0, 0.7 + 0.4 * experts)))
    axes.grid(visible=False)
    whole = framed.reshape(experts * (height + 1), count * (width + 1), -1)
    axes.imshow(
        whole.mean(-1) if whole.shape[-1] != 3 else whole,
        cmap="gray",
        aspect="equal",
        interpolation="nearest",
    )
    axes.set_xticks([])
    every = math.ceil(experts / 24)
    ticks = np.arange(0, experts, every)
    axes.set_yticks(ticks * (height + 1) + height / 2, labels=[str(e) for e in ticks])
    axes.set_ylabel("expert")
    return figure


def _panel(inks: Inks, title: str, labels: Sequence[str], height: float = HEIGHT) -> tuple[Figure, Axes]:
    """Make a figure with one panel, tall enough for a legend of `labels` below it."""
    from matplotlib.figure import Figure

    lines = sum(_wrapped(label).count("\n") + 1 for label in labels)
    legend = 0.12 + 0.2 * math.ceil(lines / _columns(labels)) if labels else 0.0
    figure = Figure(figsize=(WIDTH, height + legend), layout="constrained")
    axes = figure.add_subplot()
    frame(axes, inks, title)
    return figure, axes


def frame(axes: Axes, inks: Inks, title: str) -> None:
    """Give a panel its title, its grid and its colours."""
    axes.set_facecolor("none")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=inks.ink)
    axes.tick_params(colors=inks.ink, labelsize=9)
    axes.xaxis.label.set_color(inks.ink)
    axes.yaxis.label.set_color(inks.ink)
    axes.grid(color=inks.rule, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(inks.faint)


def _columns(labels: Sequence[str]) -> int:
    return 2 if max(map(len, labels)) <= 16 else 1


def _wrapped(label: str) -> str:
    """Wrap a label; a blank before a leading _ keeps matplotlib from leaving it out of the legend."""
    return textwrap.fill(f" {label}" if label.startswith("_") else label, 42)


def _legend(figure: Figure, inks: Inks, handles: Sequence[Any], labels: Sequence[str]) -> None:
    figure.legend(
        handles, [_wrapped(label) for label in labels],
        loc="outside lower left", ncols=_columns(labels), frameon=False, fontsize=9,
        labelcolor=inks.ink, handlelength=3.2, labelspacing=0.3,
    )  # fmt: skip


def _turn(place: int) -> int:
    """Return the number of the dash and marker of a series.

    It differs from that of the previous series of the same colour.
    """
    return (place + place // len(_MARKERS)) % len(_MARKERS)


def _exponent(largest: float) -> int:
    return 3 * max(0, math.floor(math.log10(largest) / 3)) if largest > 0 else 0


def _unit(axis: Axis, exponent: int) -> str:
    if not axis.counted or not exponent:
        return axis.label
    if axis.counted == "named" and exponent in _NAMES:
        return f"{axis.label} ({_NAMES[exponent]})"
    return f"{axis.label} (×10{str(exponent).translate(_POWERS)})"


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
