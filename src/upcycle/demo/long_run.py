"""A training of models like the demo's three for 30 % of what the start had cost; the demo takes some 2 %.

`experiments/code/long_run.py` wrote `long_run.json` from the results of its experiment. All of its runs began
with a second training of the demo's dense model, and went on with the text that this had been trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.reporting.document import Picture, Section, Sentence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from upcycle.reporting.inks import Inks

FILE = Path(__file__).with_name("long_run.json")
HIGHEST = 0.1  # nats above the dense start, the upper end of the figure: slices begin far above


@dataclass(frozen=True, kw_only=True)
class LongRun:
    """Held-out losses in nats per token, as means of seeds, after shares of the start's training FLOPs."""

    seen: int  # tokens per parameter of the start
    seeds: int
    start_flops: float
    extra: tuple[float, ...]  # per cent
    losses: Mapping[str, tuple[float, ...]]

    @property
    def about(self) -> str:
        """What the curves are, in words."""
        return (
            f"With {self.extra[-1]:.0f} % of it, from a dense model trained as this one was "
            f"({self.seen} tokens per parameter), on that training's own text, the held-out losses were "
            f"these (nats per token, means of {self.seeds} seeds; the rate falls in the last quarter)."
        )

    @property
    def ends(self) -> str:
        """How the models ended beside dense continuation, in words."""
        dense = self.losses["dense"][-1]
        told = ", ".join(
            f"{name} {abs(dense - losses[-1]):.3f} nats {'ahead' if losses[-1] < dense else 'behind'}"
            for name, losses in self.losses.items()
            if name != "dense"
        )
        return f"At the end, beside dense continuation: {told}."


@cache
def long_run() -> LongRun:
    """Return the curves that the package brings."""
    table = json.loads(FILE.read_text())
    losses = {name: tuple(curve) for name, curve in table["losses"].items()}
    return LongRun(**table | {"extra": tuple(table["extra"]), "losses": losses})


def section() -> Section:
    """Return the curves as a section of the demo's report."""
    run = long_run()
    picture = Picture(
        name="long-run",
        title="A longer training",
        caption="Against the extra compute, as a share of what the training of the dense model cost.",
        draw=_draw,
    )
    return Section(
        name="long-run",
        title="What a longer training gave",
        blocks=(
            Sentence(
                text=f"The demo spends little beside what the dense model's own training cost. {run.about}"
            ),
            picture,
            Sentence(text=run.ends),
        ),
    )


def _draw(inks: Inks) -> Figure:
    import numpy as np

    from upcycle.reporting.figures import Axis, Line, curves

    run = long_run()
    lines = [
        Line(label=name, place=place, x=np.array(run.extra), y=np.array(losses))
        for place, (name, losses) in enumerate(run.losses.items())
    ]
    x = Axis(label="extra training FLOPs (% of the start's)")
    y = Axis(label="nats per token", most=run.losses["dense"][0] + HIGHEST)
    return curves(inks, "A longer training", lines, x, y)
