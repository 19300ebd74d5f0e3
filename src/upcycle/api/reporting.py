"""`upcycle.report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle import reporting
from upcycle.advice.situation import parse_tokens
from upcycle.errors import UpcycleError


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report that has been written."""

    page: Path
    markdown: Path | None
    troubles: tuple[str, ...]  # problems with the given folders, one sentence each

    @property
    def files(self) -> tuple[Path, ...]:
        """The HTML page, and the Markdown file if there is one."""
        return (self.page,) if self.markdown is None else (self.page, self.markdown)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON."""
        markdown = None if self.markdown is None else str(self.markdown)
        return {"page": str(self.page), "markdown": markdown, "troubles": list(self.troubles)}


def report(
    folders: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    markdown: str | Path | None = None,
    title: str = reporting.TITLE,
    dense_flops: float | None = None,
    dense_tokens: float | str | None = None,
) -> Report:
    """Write an HTML page `out` that compares training runs and checkpoints.

    The page shows the result, loss curves, task scores, routers, similarity of experts and speed. `folders`
    are those of training runs and of checkpoints exported from them. `markdown` names a Markdown file with
    the same content, with figures as PNG files in a folder beside it. `dense_flops` and `dense_tokens` are
    the training cost of the dense checkpoint, used if no provenance has it; tokens may be a text such as
    "100B". An earlier report is replaced. Raises `UpcycleError` if there is nothing to show.
    """
    several = [folders] if isinstance(folders, (str, Path)) else [*folders]
    if not several:
        raise UpcycleError("give at least one RUN, a folder of `upcycle train` or `upcycle export`")
    if isinstance(dense_tokens, str):
        dense_tokens = parse_tokens(dense_tokens, "--dense-tokens")
    troubles = reporting.report(
        several, out, markdown=markdown, title=title, dense_flops=dense_flops, dense_tokens=dense_tokens
    )
    twin = None if markdown is None else Path(markdown)
    return Report(page=Path(out), markdown=twin, troubles=tuple(troubles))
