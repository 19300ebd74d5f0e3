"""Draws what `upcycle train --dry-run` found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.cli.screen import grid, out, show_warnings
from upcycle.system.wording import count, size

if TYPE_CHECKING:
    from upcycle.training.rehearsal import Rehearsal


def show_rehearsed(found: Rehearsal) -> None:
    """Show the model, the batch, and what each rank that was built holds."""
    layout = ", ".join(f"{name} {ways}" for name, ways in found.layout.items() if ways > 1)
    out.print(f"{found.world} processes ({layout or 'one'}), {found.precision}")
    out.print(f"{count(found.parameters)} parameters, {count(found.active_parameters)} active per token")
    micro = "as many as fit" if found.micro_batch is None else str(found.micro_batch)
    out.print(
        f"{found.steps} steps of {count(found.tokens_per_step)} tokens; {found.rows} rows, "
        f"{found.rows_per_rank} a rank; micro batch {micro}; "
        f"activations about {size(found.activations_per_row)} a row"
    )
    table = grid("", "rank", "weights", "gradients", "moments", "together", "even shares", "reads")
    for held in found.ranks:
        sizes = (size(n) for n in (held.weights, held.gradients, held.moments, held.total))
        table.add_row(str(held.rank), *sizes, f"{held.over_even_share:.3f}", size(held.reads))
    out.print(table)
    if teacher := max((held.teacher for held in found.ranks), default=0):
        out.print(f"the teacher takes up to {size(teacher)} of a rank, which are counted in together")
    why = f": {found.not_stepped}" if found.not_stepped else ""
    out.print(f"{found.stepped} steps were simulated on tensors without data{why}")
    show_warnings(list(found.warnings))
