"""Draws the result of `upcycle advise`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table

from upcycle.cli.screen import out
from upcycle.system.wording import quoted

if TYPE_CHECKING:
    from upcycle.advice.gather import Advice
    from upcycle.advice.statements import Statement

FILE = "moe.toml"  # the name that the recipe is given in the command that uses it


def show_advice(advice: Advice, *, all: bool = False) -> None:
    """Show the verdict, the statements that hold, a count of the others, and a recipe.

    With `all` the others are shown as well.
    """
    plan, outside = advice.plan, advice.outside()
    out.print(f"{plan.family} -> {plan.target}: {plan.made}")
    out.print(f"\n{advice.verdict.sentence}")
    out.print()
    out.print(_table((*advice.holding(), *(outside if all else ()))), soft_wrap=False)
    if outside and not all:
        out.print(f"\n{_folded(len(outside))}")
    out.print(f"\nA recipe to try: save it as {FILE} and run")
    out.print(f"  upcycle convert {quoted(plan.source)} OUT --recipe {FILE}")
    out.print()
    for line in advice.recommended.toml.splitlines():
        out.print(line)


def _folded(count: int) -> str:
    if count == 1:
        return "1 statement does not cover this input; --all shows it."
    return f"{count} statements do not cover this input; --all shows them."


def _table(statements: Iterable[Statement]) -> Table:
    """One row a statement: its topic, text, source, and whether it covers the input."""
    shown = Table(box=None, pad_edge=False, header_style="bold", width=out.width)
    shown.add_column("what", no_wrap=True)
    for column, share in (("", 5), ("source", 3), ("holds here", 3)):
        shown.add_column(column, ratio=share, overflow="fold")
    topic = ""
    for one in statements:
        mark = {True: "yes", False: "no", None: "not known"}[one.inside]
        shown.add_row(one.topic if one.topic != topic else "", one.said, one.source, f"{mark}: {one.why}")
        topic = one.topic
    return shown
