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
    rows = {
        "parameters": [plan.dense_parameters, plan.total_parameters],
        "active per token": [plan.dense_active_parameters, plan.active_parameters],
        "FLOPs per token (forward)": [plan.dense_flops_per_token, plan.flops_per_token],
    }
    heads = [plan.source_kind, plan.kind]
    if plan.predecessor is not None:
        heads.insert(1, f"{plan.source_kind}, narrower")
        for row, number in zip(rows.values(), plan.predecessor.values(), strict=True):
            row.insert(0, number)
    table = grid(f"{plan.family} -> {plan.target}", "", *heads)
    for name, row in rows.items():
        table.add_row(name, *map(count, row))
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
