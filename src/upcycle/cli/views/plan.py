"""Draws the result of `upcycle plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.cli.screen import grid, out, show_warnings
from upcycle.cli.views.routers import routers_said
from upcycle.system.wording import count, size

if TYPE_CHECKING:
    from upcycle.blueprints.cost import Plan


def show_plan(plan: Plan) -> None:
    """Show the plan as a table."""
    heads, parameters, active, flops = zip(*plan.columns, strict=True)
    table = grid(f"{plan.family} -> {plan.target}", "", *heads)
    table.add_row("parameters", *map(count, parameters))
    table.add_row("active per token", *map(count, active))
    table.add_row("FLOPs per token (forward)", *map(count, flops))
    out.print(table)
    out.print(plan.made)
    out.print(f"writes {size(plan.output_bytes)} with at most {size(plan.peak_memory_bytes)} of memory")
    out.print(
        f"computes what the {plan.source_kind} model computes: "
        + ("yes" if plan.preserves_function else "no")
    )
    for said in routers_said(plan.routers):
        out.print(said)
    out.print(f"blueprint {plan.blueprint_hash}")
    show_warnings(plan.warnings)
