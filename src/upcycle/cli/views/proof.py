"""Draws the result of `upcycle verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from upcycle.cli.screen import out

if TYPE_CHECKING:
    from upcycle.verification import Proof


def show_proof(proof: Proof) -> None:
    """Show one line for each check, then the verdict."""
    for check in proof.checks:
        mark = {True: "[green]ok[/]  ", False: "[red]FAIL[/]", None: "[dim]--[/]  "}[check.holds]
        out.print(mark + escape(f" {check.name}: {check.detail}"), markup=True)
    out.print("[green]holds[/]" if proof.holds else "[red]does not hold[/]", markup=True)
