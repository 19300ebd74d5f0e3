"""Draws the result of `upcycle report`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.cli.screen import err, out

if TYPE_CHECKING:
    from upcycle.api.reporting import Report


def show_reported(report: Report) -> None:
    """Show the problems on standard error and the files on standard output."""
    for trouble in report.troubles:
        err.print(f"! {trouble}", soft_wrap=True)
    for file in report.files:
        out.print(str(file))
