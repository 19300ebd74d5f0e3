"""Draws the result of `upcycle advise`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from upcycle.cli.screen import out

if TYPE_CHECKING:
    from upcycle.advice.gather import Advice


def show_advice(advice: Advice) -> None:
    """Show one row for each statement, then the verdict.

    A row has the source, and whether the input is inside the range for which the source found it.
    """
    plan = advice.plan
    shown = Table(title=f"{plan.family} -> {plan.target}: {plan.made}", title_justify="left", box=None,
                  pad_edge=False, header_style="bold", width=out.width)  # fmt: skip
    shown.add_column("what", no_wrap=True)
    for column, share in (("", 5), ("source", 3), ("inside its range", 3)):
        shown.add_column(column, ratio=share, overflow="fold")
    topic = ""
    for statement in advice.statements:
        mark = {True: "yes", False: "no", None: "not known"}[statement.inside]
        new = statement.topic if statement.topic != topic else ""
        cells = (new, statement.said, statement.source, f"{mark}: {statement.why}")
        shown.add_row(*cells)
        topic = statement.topic
    out.print(shown, soft_wrap=False)
    out.print(f"\n{advice.verdict.sentence}")
