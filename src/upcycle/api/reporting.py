"""`upcycle.report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle import reporting
from upcycle.errors import UpcycleError


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report that was written."""

    page: Path
    markdown: Path | None
    troubles: tuple[str, ...]  # what is wrong with what was given, a sentence each

    @property
    def files(self) -> tuple[Path, ...]:
        """The page and its Markdown twin, if there is one."""
        return (self.page,) if self.markdown is None else (self.page, self.markdown)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        markdown = None if self.markdown is None else str(self.markdown)
        return {"page": str(self.page), "markdown": markdown, "troubles": list(self.troubles)}


def report(
    folders: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    markdown: str | Path | None = None,
    title: str = reporting.TITLE,
    dense_flops: float | None = None,
    dense_tokens: float | None = None,
) -> Report:
    """Write the page `out` about runs and checkpoints: did it pay, curves, tasks, routers, similarity, speed.

    `folders` are those of training runs, and of checkpoints that they were exported to. `markdown` names a
    file for the same as Markdown, with figures as PNG in a folder beside it. `dense_flops` and `dense_tokens`
    tell what the training of the dense checkpoint had cost if no provenance does. A report that was made
    before is replaced. Raises `UpcycleError` if nothing can be shown.
    """
    several = [folders] if isinstance(folders, (str, Path)) else [*folders]
    if not several:
        raise UpcycleError("give at least one RUN, a folder of `upcycle train` or `upcycle export`")
    troubles = reporting.report(
        several, out, markdown=markdown, title=title, dense_flops=dense_flops, dense_tokens=dense_tokens
    )
    twin = None if markdown is None else Path(markdown)
    return Report(page=Path(out), markdown=twin, troubles=tuple(troubles))
