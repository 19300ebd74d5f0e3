"""`upcycle report`: a page on training runs and checkpoints, in HTML and optionally in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.errors import UpcycleError
from upcycle.system import claim, whole_file

if TYPE_CHECKING:
    from upcycle.reporting.document import Section

TITLE = "Upcycling report"


def report(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    markdown: str | Path | None = None,
    title: str = TITLE,
    dense_flops: float | None = None,
    dense_tokens: float | None = None,
    further: Sequence[Section] = (),
) -> list[str]:
    """Write the page `out` about runs and checkpoints, and return a sentence for each problem with them.

    `markdown` names a Markdown file with the same content, with PNGs in `figures` beside it. `dense_flops`
    and `dense_tokens` are the training cost of the dense checkpoint that runs start from, used if no
    provenance has it. `further` are sections that end the report. An earlier report is replaced; any other
    file raises an error. Raises `UpcycleError` if nothing can be shown.
    """
    from upcycle.reporting import drawing, page, sections
    from upcycle.reporting import markdown as twin
    from upcycle.reporting.starts import DenseCost
    from upcycle.reporting.study import study

    out = Path(out)
    text = None if markdown is None else Path(markdown)
    for name, value in (("--dense-flops", dense_flops), ("--dense-tokens", dense_tokens)):
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value < float("inf")):
            raise UpcycleError(f"{name} = {value!r}; it must be a number of 0 or more")
    if text is not None and text.resolve() == out.resolve():
        raise UpcycleError(f"the page and its Markdown twin are both {out}; give them two names")
    drawing.need_matplotlib()
    _refuse_foreign(out, page.SIGN)
    if text is not None:
        _refuse_foreign(text, twin.SIGN)
    about = study(folders, DenseCost(flops=dense_flops, tokens=dense_tokens))
    document = sections.document(about, title, further)
    files = {out: page.render(document).encode("utf-8", "replace")}
    if text is not None:
        written, figures = twin.render(document, text.stem)
        files = (
            {text.parent / name: data for name, data in figures.items()}
            | files
            | {text: written.encode("utf-8", "replace")}
        )
        for path in files.keys() - {out, text}:
            _refuse_foreign(path, drawing.MADE_BY)
    for path, data in files.items():
        whole_file.write(path, data)
    return about.troubles()


def _refuse_foreign(path: Path, sign: str) -> None:
    """Raise an error for a path with anything but a file of a report, which begins with `sign`."""

    def ours(path: Path) -> bool:
        with path.open("rb") as file:
            return sign.encode() in file.read(4096)

    claim.may_replace(path, ours, "a file of a report")
