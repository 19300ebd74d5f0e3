"""A report as one self-contained HTML page with its style, script and figures.

Every string of the document is escaped. The content security policy of the page forbids other scripts and all
requests, whatever a name contains.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator
from html import escape as escaped
from importlib import resources
from itertools import groupby

from upcycle.reporting import drawing
from upcycle.reporting.document import Block, Document, Picture, Section, Sentence, Table, clean
from upcycle.reporting.inks import DARK, LIGHT, Inks

SIGN = f'<meta name="generator" content="{drawing.MADE_BY}">'


def render(document: Document) -> str:
    """Return the page as HTML."""
    style, script = _resource("page.css"), _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        f"base-uri 'none'; form-action 'none'"
    )
    title = escape(document.title)
    links = "".join(f'<li><a href="#{s.name}">{escape(s.title)}</a></li>' for s in document.sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{SIGN}
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{_colours()}{style}</style>
</head>
<body>
<header><h1>{title}</h1><button id="theme" type="button" hidden>Colours</button></header>
<main>
<nav aria-label="Sections"><ul>{links}</ul></nav>
{"".join(map(_section, document.sections))}</main>
<footer>Made by <code>upcycle report</code>. This page is complete: it fetches nothing.</footer>
<script>{script}</script>
</body>
</html>
"""


def _resource(name: str) -> str:
    return resources.files("upcycle.reporting").joinpath(name).read_text(encoding="utf-8")


def _colours() -> str:
    """Return the CSS of light and dark colours, chosen by the system's preference or by the button."""
    light, dark = _variables(LIGHT, "light"), _variables(DARK, "dark")
    return (
        f":root {{ {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f"@media screen {{ :root[data-theme=light] {{ {light} }} :root[data-theme=dark] {{ {dark} }} }}\n"
    )


def _variables(inks: Inks, scheme: str) -> str:
    return f"color-scheme: {scheme}; " + " ".join(f"--{k}: {v};" for k, v in inks.named().items())


def _section(section: Section) -> str:
    head = f"{section.name}-head"
    return (
        f'<section id="{section.name}" aria-labelledby="{head}">\n'
        f'<h2 id="{head}">{escape(section.title)}</h2>\n{"".join(_blocks(section.blocks))}</section>\n'
    )


def _blocks(blocks: Iterable[Block]) -> Iterator[str]:
    """Yield the HTML of blocks; consecutive pictures are side by side if there is room."""
    for pictures, run in groupby(blocks, key=lambda block: isinstance(block, Picture)):
        inner = "".join(map(_block, run))
        yield f'<div class="figures">\n{inner}</div>\n' if pictures else inner


def _block(block: Block) -> str:
    if isinstance(block, Sentence):
        kind = "" if block.tone == "plain" else f' class="{block.tone}"'
        return f"<p{kind}>{escape(block.text)}</p>\n"
    if isinstance(block, Picture):
        caption = f"<figcaption>{escape(block.caption)}</figcaption>"
        return f'<figure id="figure-{block.name}">\n{drawing.svg(block)}\n{caption}\n</figure>\n'
    return _table(block)


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{_kind(i, table.left)}>{escape(cell)}</th>' for i, cell in enumerate(table.head)
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td{_kind(i, table.left)}>{escape(cell)}</td>" for i, cell in enumerate(rest, 1))
        + "</tr>\n"
        for first, *rest in table.rows
    )
    caption = escape(table.caption)
    note = f'<p class="note">{escape(table.note)}</p>\n' if table.note else ""
    return (
        f'<div class="table">\n<h3>{caption}</h3>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">\n'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n{note}</div>\n"
    )


def _kind(place: int, left: int) -> str:
    return ' class="number"' if place >= left else ' class="text"'


def escape(text: str) -> str:
    """Escape text for HTML."""
    return escaped(clean(text))
