"""A report as Markdown, with its figures as PNG files beside it."""

from __future__ import annotations

from urllib.parse import quote

from upcycle.conversion.plain import plain
from upcycle.reporting import drawing
from upcycle.reporting.document import Block, Document, Picture, Sentence, Table, clean

SIGN = f"<!-- {drawing.MADE_BY} -->"
FOLDER = "figures"


def render(document: Document, prefix: str) -> tuple[str, dict[str, bytes]]:
    """Return the text and the figures by path; `prefix` begins their file names."""
    figures: dict[str, bytes] = {}
    parts = [SIGN, f"# {_plain(document.title)}"]
    for section in document.sections:
        parts.append(f"## {_plain(section.title)}")
        for block in section.blocks:
            parts.append(_block(block, prefix, figures))
    return "\n\n".join(parts) + "\n", figures


def _block(block: Block, prefix: str, figures: dict[str, bytes]) -> str:
    if isinstance(block, Sentence):
        text = _plain(block.text)
        return f"> **Note:** {text}" if block.tone == "warning" else text
    if isinstance(block, Picture):
        path = f"{FOLDER}/{prefix}-{block.name}.png"
        figures[path] = drawing.png(block)
        return f"![{_plain(block.title)}]({quote(path)})\n\n{_plain(block.caption)}"
    return _table(block)


def _table(table: Table) -> str:
    rules = ["---" if i < table.left else "---:" for i in range(len(table.head))]
    rows = [table.head, tuple(rules), *table.rows]
    lines = [_row(row, raw=row is rows[1]) for row in rows]
    note = f"\n\n{_plain(table.note)}" if table.note else ""
    return f"**{_plain(table.caption)}**\n\n" + "\n".join(lines) + note


def _row(cells: tuple[str, ...], raw: bool) -> str:
    return "| " + " | ".join(cell if raw else _plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Escape text for Markdown, on one line."""
    return plain(clean(text))
