"""Shows the steps and results of `upcycle demo`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.cli.screen import grid, out
from upcycle.cli.views.scores import show_scores
from upcycle.demo.long_run import LongRun, long_run
from upcycle.errors import listed
from upcycle.system.wording import count

if TYPE_CHECKING:
    from upcycle.api.evaluation import Evaluation
    from upcycle.demo.story import Continued, Made

SHOWN = (0, 2, 6, 11, 22, 30)  # per cent of extra FLOPs that are shown of the longer training


class Screening:
    """The audience of the demo: a person at a screen."""

    def say(self, sentence: str) -> None:
        """Show a line of text."""
        out.print(sentence)

    def made(self, mixtures: Mapping[str, Made]) -> None:
        """Show a table of the Mixtures of Experts before their training."""
        show_made(mixtures)

    def evaluated(self, found: Evaluation) -> None:
        """Show the tables of `upcycle eval`."""
        show_scores(found.as_dict())

    def continued(self, rows: Sequence[Continued], page: Path) -> None:
        """Show a table and one sentence."""
        show_continued(rows, page)


def show_made(made: Mapping[str, Made]) -> None:
    """Show the Mixtures of Experts before their training."""
    table = grid("", "model", "parameters", "active", "largest logit difference", "promise kept")
    for name, one in made.items():
        table.add_row(
            name,
            count(one.plan.total_parameters),
            count(one.plan.active_parameters),
            f"{one.proof.logits['random'].relative:.1e} of scale",
            "yes" if one.proof.holds else "NO",
        )
    out.print(table)
    same = [name for name, one in made.items() if one.plan.preserves_function]
    others = [name for name in made if name not in same]
    out.print(
        f"{listed(same)} computes what the dense model computes; {listed(others)} does not, and has to learn"
    )


def show_continued(rows: Sequence[Continued], page: Path) -> None:
    """Show the results of continued training as a table and one sentence."""
    table = grid("\ntrained on", "model", "tokens", "training FLOPs", "held-out before", "held-out after")
    for row in rows:
        table.add_row(
            row.name, count(row.tokens), f"{row.flops:.3g}", f"{row.before:.4f}", f"{row.after:.4f}"
        )
    out.print(table)
    dense, *moes = rows
    best = min(moes, key=lambda row: row.after)
    gained = dense.after - best.after
    out.print(f"report: {page}")
    out.print(
        f"At equal FLOPs the best MoE ({best.name}) ends at {best.after:.3f} nats per token and the dense "
        f"model at {dense.after:.3f}: upcycling {'gained' if gained > 0 else 'lost'} {abs(gained):.3f} "
        f"(one seed)."
    )
    show_long_run(long_run(), dense.flops)


def show_long_run(run: LongRun, spent: float) -> None:
    """Show what a longer training gave, beside a demo that spent so many FLOPs on each model."""
    out.print(
        f"\nThat was {100 * spent / run.start_flops:.2g} % of what the dense model's own training cost."
    )
    out.print(run.about)
    table = grid("", "extra FLOPs", *run.losses)
    for place in sorted({_nearest(run, extra) for extra in SHOWN}):
        table.add_row(
            f"{run.extra[place]:.0f} %", *(f"{losses[place]:.4f}" for losses in run.losses.values())
        )
    out.print(table)
    out.print(run.ends)


def _nearest(run: LongRun, extra: float) -> int:
    return min(range(len(run.extra)), key=lambda place: abs(run.extra[place] - extra))
