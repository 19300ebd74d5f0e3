"""Escaping of foreign text for Markdown: names and keys never become headings, links or HTML."""

from __future__ import annotations

import re

# An underscore inside a word is an ordinary character; elsewhere it begins or ends emphasis.
_SPECIAL = re.compile(r"([\\`*\[\]<>#|~$&]|(?<![^\W_])_|_(?![^\W_]))")


def plain(text: str) -> str:
    """Return text that Markdown shows literally, on one line."""
    return _SPECIAL.sub(r"\\\1", _line(text))


def code(text: str) -> str:
    """Return a code span around any text, on one line."""
    text = _line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _line(text: str) -> str:
    """Return the text on one line, without control characters and characters that cannot be encoded."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(shown.split())
