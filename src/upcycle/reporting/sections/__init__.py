"""The sections of a report, in order. Each file here turns a study into a `Section` or None."""

from __future__ import annotations

from collections.abc import Iterable

from upcycle.reporting.document import Document, Section
from upcycle.reporting.sections import built, losses, routers, similarity, speed, summary, tasks
from upcycle.reporting.study import Study

ORDER = (summary, built, losses, tasks, routers, similarity, speed)


def document(study: Study, title: str, further: Iterable[Section] = ()) -> Document:
    """Return the whole report, which ends with `further`; a section that has nothing to show is left out."""
    made = [part.section(study) for part in ORDER]
    return Document(title=title, sections=(*(section for section in made if section is not None), *further))
