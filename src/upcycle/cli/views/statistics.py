"""Draws the result of `upcycle calibrate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.cli.screen import grid, out
from upcycle.system.wording import count, place_of, size

if TYPE_CHECKING:
    from upcycle.records.statistics import Statistics


def show_calibrated(found: Statistics) -> None:
    """Show a table of the layers: the share of active neurons, and the number that were never active."""
    table = grid("", "layer", "neurons", "active", "never active")
    for stack, layer in found.blocks("neurons", "count"):
        shares = found.of("neurons", stack, layer, "count")
        table.add_row(
            place_of(stack, layer), str(len(shares)), f"{shares.mean():.1%}", str(int((shares == 0).sum()))
        )
    if table.row_count:
        out.print(table)
    made = found.provenance
    kept = "; ".join(f"{', '.join(names)} of {', '.join(where)}" for where, names in found.kept().items())
    tokens = " + ".join(
        f"{count(n)} {stack}" if stack != "layers" else count(n) for stack, n in made["tokens"].items()
    )
    out.print(
        f"{found.path}: {kept} over {made['examples']} examples ({tokens} tokens), "
        f"{size(found.path.stat().st_size)}"
    )
    out.print(f"digest {found.digest}")
