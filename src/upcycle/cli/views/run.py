"""Draws the results of `upcycle train` and `upcycle export`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.cli.screen import out
from upcycle.system.wording import count, quoted

if TYPE_CHECKING:
    from upcycle.training.export import Exported
    from upcycle.training.loop import Result


def show_trained(result: Result) -> None:
    """Show how the run ended."""
    held_out = "" if result.held_out_loss is None else f", held-out loss {result.held_out_loss:.4f}"
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    out.print(f"{result.out}: {result.steps} steps{loss}{held_out}")
    if result.finished:
        out.print(f"use it: upcycle export {quoted(result.out)} OUT")


def show_exported(exported: Exported) -> None:
    """Show one line on the folder."""
    out.print(
        f"{exported.out}: step {exported.step}, {count(exported.parameters)} parameters in {exported.dtype}"
    )
