"""Text that comes from elsewhere, as Markdown shows it: names and keys, never headings, links or HTML."""

from __future__ import annotations

import re

# An underscore inside a word is a letter like any other; elsewhere it begins or ends emphasis.
_SPECIAL = re.compile(r"([\\`*\[\]<>#|~$&]|(?<![^\W_])_|_(?![^\W_]))")


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", _line(text))


def code(text: str) -> str:
    """A code span around any text, on one line."""
    text = _line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _line(text: str) -> str:
    """One line without control characters, and without what no encoding can hold."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(shown.split())
