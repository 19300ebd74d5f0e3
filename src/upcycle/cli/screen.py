"""Standard output and standard error as a person sees them: texts of files are shown and never obeyed."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from upcycle.errors import printable


class Screen(Console):
    """A console that shows texts of other people's files and never obeys them."""

    def render_str(self, text: str, **options: Any) -> Text:
        own = len(text) - len(text.lstrip("\n"))  # lines left free before a sentence are ours
        return super().render_str(text[:own] + printable(text[own:]), **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


_SEEN = sys.stdout is not None and sys.stdout.isatty()
# Sentences are left to the terminal to wrap, and whole where the output is a file.
out = Screen(highlight=False, markup=False, emoji=False, soft_wrap=True, width=None if _SEEN else 120)
err = Screen(stderr=True, highlight=False, markup=False, emoji=False)


def quoted(*words: object) -> str:
    """The words of a command as a shell takes them back."""
    return " ".join(map(_quoted, map(str, words)))


def _quoted(word: str) -> str:
    if not word.isprintable():
        text = word.replace("\\", "\\\\").replace("'", "\\'")
        return f"$'{printable(text)}'"
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


def show_json(value: object) -> None:
    """JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def grid(title: str, *columns: str) -> Table:
    """A table with a title; every column but the first is right-aligned."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    return table


def show_warnings(warnings: list[str]) -> None:
    """One line each."""
    for warning in warnings:
        out.print(f"[yellow]![/] {escape(warning)}", markup=True)
