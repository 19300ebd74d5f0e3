"""Draws the results of `upcycle list` and `upcycle keys`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from upcycle.cli.screen import out

if TYPE_CHECKING:
    from upcycle.cli.keys import Key


def show_catalogue(table: dict[str, list[dict[str, str]]]) -> None:
    """Show one table for each kind."""
    for kind, rows in table.items():
        shown = Table(title=kind, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column in ("name", "what it is", "needs"):
            shown.add_column(column, overflow="fold")
        for row in rows:
            shown.add_row(row["name"], row["summary"], row["needs"])
        out.print(shown)
        out.print()


def show_keys(keys: dict[str, list[Key]]) -> None:
    """Show one table for each section."""
    for section, rows in keys.items():
        shown = Table(title=section, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column in ("key", "takes", "default", ""):
            shown.add_column(column, overflow="fold")
        for row in rows:
            shown.add_row(row.name, row.takes, row.default, row.sentence)
        out.print(shown, soft_wrap=False)
        out.print()
