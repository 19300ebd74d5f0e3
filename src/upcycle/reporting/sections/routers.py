"""The section on routers: in training, and on the rows that `upcycle inspect` gave them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from upcycle.records.routing import RoutingRecord
from upcycle.reporting import figures, formats
from upcycle.reporting.comparison import Group
from upcycle.reporting.document import Block, Picture, Section, Table
from upcycle.reporting.figures import Axis, Line
from upcycle.reporting.runs import Health, is_load, is_number, place_of
from upcycle.reporting.study import Study

_POINTS = 200  # the most points of a line; more are averaged in windows
_LABELS = ("expert", "layer", "load / even share")


def section(study: Study) -> Section | None:
    """Return the section; None if there are no routers."""
    groups = [
        (place, group, health)
        for place, group in enumerate(study.groups)
        if (health := group.runs[0].health) is not None
    ]
    looked_at = [(c, c.routing) for c in study.checkpoints if c.routing and c.routing.layers]
    if not groups and not looked_at:
        return None
    blocks: list[Block] = []
    if groups:
        blocks.append(_entropy(groups))
        blocks += [_load(place, group, health) for place, group, health in groups]
        blocks.append(_table([(group, health) for _, group, health in groups]))
    for number, (checkpoint, routing) in enumerate(looked_at):
        blocks += on_shown(number, checkpoint.name, routing)
    return Section(name="routers", title="Router health", blocks=tuple(blocks))


def _entropy(groups: Iterable[tuple[int, Group, Health]]) -> Picture:
    lines = []
    for place, group, health in groups:
        windows = np.array_split(np.arange(len(health.tokens)), min(_POINTS, len(health.tokens)))
        entropy = np.stack([health.entropy[w].mean(axis=0) for w in windows])  # [points, L]
        lines.append(
            Line(
                label=group.label,
                place=place,
                x=np.array([health.tokens[w].mean() for w in windows]),
                y=entropy.mean(axis=1),
                low=entropy.min(axis=1),
                high=entropy.max(axis=1),
                marked=False,
            )
        )
    title = "Evenness of the experts' load"
    return Picture(
        name="entropy",
        title=title,
        caption="Entropy of the load over that of an even one: 1 is even, 0 is one expert for all. Mean over "
        "layers; the band is from the lowest to the highest layer. Of the first run of each model.",
        draw=partial(
            figures.curves,
            title=title,
            lines=lines,
            x=Axis(label="tokens trained on", counted="named"),
            y=Axis(label="entropy of load / log E", most=1.01),
        ),
    )


def _load(place: int, group: Group, health: Health) -> Picture:
    title = "Load of each expert"
    return Picture(
        name=f"load-{place + 1}",
        title=title,
        caption=f"{group.label}: {group.runs[0].name}, mean over its last {health.steps} steps of training.",
        draw=partial(
            figures.heat_map, title=title, rows=health.places, values=_even(health.load), labels=_LABELS
        ),
    )


def _even(load: Iterable[Any]) -> np.ndarray:
    """Return loads as multiples of an even share, [L, E]; NaN beyond the experts of a layer."""
    rows = [np.asarray(row, np.float64) for row in load]
    out = np.full((len(rows), max(map(len, rows))), math.nan)
    for row, into in zip(rows, out, strict=True):
        into[: len(row)] = row / row.sum() * len(row)
    return out


def _table(groups: list[tuple[Group, Health]]) -> Table:
    rows = []
    for group, _ in groups:
        healths = [run.health for run in group.runs if run.health is not None]
        last = [(h, slice(-h.steps, None)) for h in healths]
        entropy = np.array([h.entropy[s].mean(axis=0) for h, s in last])  # [runs, L]
        experts = sum(map(len, healths[0].load))
        dead = np.mean([h.dead[-1].sum() for h in healths])
        collapsed = np.mean([h.collapsed[-1].sum() for h in healths])
        left = np.mean([h.left_behind[s].mean() for h, s in last])
        busiest = np.mean([np.nanmax(_even(h.load)) for h in healths])
        rows.append(
            (
                group.label,
                str(len(healths[0].places)),
                f"{entropy.mean():.3f}",
                f"{entropy.mean(axis=0).min():.3f}",
                f"{busiest:.2f}",
                f"{dead:g} of {experts}",
                f"{collapsed:g}",
                formats.percent(float(left)),
            )
        )
    return Table(
        caption="Routers at the end of training",
        head=(
            "model", "MoE layers", "entropy, mean", "entropy, lowest layer", "busiest expert / even share",
            "dead experts", "collapsed layers", "tokens left behind",
        ),
        rows=tuple(rows),
        note="Means over the seeds of a model; dead and collapsed at the last step, the others over the last "
        "steps that the heat maps are of.",
    )  # fmt: skip


def on_shown(number: int, name: str, routing: RoutingRecord) -> list[Block]:
    """Return the routing of a checkpoint on the domains that it was inspected on."""
    blocks = (_use(number, name, routing), _confidence(name, routing), _liked(name, routing))
    return [block for block in blocks if block is not None]


def _use(number: int, name: str, routing: RoutingRecord) -> Picture | None:
    """Return a heat map of the experts' load on each domain; None if no layer has a load."""
    loads = [
        (f"{place_of(layer.stack, layer.layer)}, {domain}", load)
        for layer in routing.layers
        for domain, load in layer.by_domain.items()
        if is_load(load)
    ]
    if not loads:
        return None
    title = "Use of the experts by domain"
    return Picture(
        name=f"routing-{number + 1}",
        title=title,
        caption=f"{name}: on what it was inspected on; weights where a router gives every "
        "expert as many tokens.",
        draw=partial(
            figures.heat_map,
            title=title,
            rows=[place for place, _ in loads],
            values=_even(load for _, load in loads),
            labels=_LABELS,
        ),
    )


def _confidence(name: str, routing: RoutingRecord) -> Table | None:
    """Return the numbers of every layer's router; None if there are none."""
    layers = routing.layers
    columns = [
        ("confidence", [layer.confidence for layer in layers]),
        ("tokens left behind", [layer.left_behind for layer in layers]),
        ("divergence of domains, bits", [_apart(layer.divergence) for layer in layers]),
    ]
    columns = [(head, numbers) for head, numbers in columns if any(map(is_number, numbers))]
    if not columns:
        return None
    rows = zip(layers, *(numbers for _, numbers in columns), strict=True)
    return Table(
        caption=f"Routers of {name} on what it was shown",
        head=("layer", *(head for head, _ in columns)),
        rows=tuple(
            (place_of(layer.stack, layer.layer), *(formats.loss(_known(n)) for n in numbers))
            for layer, *numbers in rows
        ),
        note=f"Domains: {', '.join(domain.name for domain in routing.domains)}.",
    )


def _liked(name: str, routing: RoutingRecord) -> Table | None:
    """Return the tokens that each expert of the last layer likes best; None without text."""
    liked = _favourites(routing)
    if not liked:
        return None
    return Table(
        caption=f"Tokens that the experts of {name} like best",
        head=("layer", "expert", "tokens"),
        rows=tuple(liked),
        left=3,
        note="Largest mean probability of tokens that came five times or more; the last MoE layer.",
    )


def _favourites(routing: RoutingRecord) -> list[tuple[str, ...]]:
    """Return one row of favourite tokens for each expert of the last layer, for text."""
    if routing.kind != "text":
        return []
    last = routing.layers[-1]
    return [
        (place_of(last.stack, last.layer), str(expert), "  ".join(str(pair[0]) for pair in liked if pair))
        for expert, liked in enumerate(last.favourites)
    ]


def _known(number: float | None) -> float:
    return math.nan if number is None else number


def _apart(matrix: Sequence[Sequence[float]]) -> float | None:
    """Return the mean of the off-diagonal elements of a matrix; None if there are none."""
    apart = [x for i, row in enumerate(matrix) for j, x in enumerate(row) if i != j]
    return sum(apart) / len(apart) if apart else None
