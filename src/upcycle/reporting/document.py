"""A report before it has a form: sections of sentences, tables and pictures. `page` and `markdown` render it.

Every string in it is plain text; whoever renders it escapes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from upcycle.reporting.inks import Inks


# Control characters but for blanks of all kinds, halves of characters, and what XML has no place for.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """Text that a page, a drawing and a file can hold: names and labels come from files, with anything in
    them."""
    return _UNFIT.sub("\N{REPLACEMENT CHARACTER}", text)


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A paragraph; a warning is something that is wrong with what was given."""

    text: str
    tone: Literal["plain", "warning", "small"] = "plain"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of text under a head; columns from number `left` on are numbers."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure that is drawn when its colours are known. `name` is unique in a report, of [a-z0-9-]."""

    name: str
    title: str
    caption: str
    draw: Callable[[Inks], Figure]


Block = Sentence | Table | Picture


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands below it."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A whole report."""

    title: str
    sections: tuple[Section, ...]
