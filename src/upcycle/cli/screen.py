"""Standard output and error for a person; control characters in texts from files have no effect."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from upcycle.errors import printable


class Screen(Console):
    """A console that shows texts from files without obeying their control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        own = len(text) - len(text.lstrip("\n"))  # blank lines before a sentence come from our own code
        return super().render_str(text[:own] + printable(text[own:]), **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


_SEEN = sys.stdout is not None and sys.stdout.isatty()
# The terminal wraps sentences; in a file they stay whole.
out = Screen(highlight=False, markup=False, emoji=False, soft_wrap=True, width=None if _SEEN else 120)
err = Screen(stderr=True, highlight=False, markup=False, emoji=False)


def show_json(value: object) -> None:
    """Print JSON to standard output; numbers that JSON has no form for, NaN and inf, are null."""
    sys.stdout.write(json.dumps(_finite(value), indent=2) + "\n")


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def grid(title: str, *columns: str) -> Table:
    """Make a table with a title; every column but the first is right-aligned.

    A narrow terminal breaks a long word into lines, so that no number is cut.
    """
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    return table


def show_warnings(warnings: list[str]) -> None:
    """Show each warning on its own line."""
    for warning in warnings:
        out.print(f"[yellow]![/] {escape(warning)}", markup=True)
