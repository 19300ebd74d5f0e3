"""Draws the result of `upcycle convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.cli.screen import out, show_warnings
from upcycle.system.wording import count, quoted, size

if TYPE_CHECKING:
    from upcycle.blueprints.cost import Plan


def show_converted(plan: Plan, folder: Path) -> None:
    """Show one line on the folder, the warnings, and the command that verifies it."""
    out.print(
        f"{folder}: {plan.target}, {plan.made}, "
        f"{count(plan.total_parameters)} parameters, {count(plan.active_parameters)} active, "
        f"{size(plan.output_bytes)}"
    )
    show_warnings(plan.warnings)
    out.print(f"check it: upcycle verify {quoted(plan.source, folder)}")
