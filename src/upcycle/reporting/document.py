"""A report without a format: sections of sentences, tables and pictures for `page` and `markdown`.

Every string in it is plain text; the renderer escapes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from upcycle.reporting.inks import Inks


# Control characters except blanks, surrogates, and characters that XML forbids.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """Remove characters that a page, a drawing or a file cannot hold; names and labels come from files."""
    return _UNFIT.sub("\N{REPLACEMENT CHARACTER}", text)


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A paragraph; a warning is a problem with the given folders."""

    text: str
    tone: Literal["plain", "warning", "small"] = "plain"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text cells with a header; columns from number `left` on hold numbers."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure, drawn once its colours are known. `name` is unique in a report, of [a-z0-9-]."""

    name: str
    title: str
    caption: str
    draw: Callable[[Inks], Figure]


Block = Sentence | Table | Picture


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with its blocks."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A complete report."""

    title: str
    sections: tuple[Section, ...]
