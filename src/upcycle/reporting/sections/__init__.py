"""The sections of a report, in order. A file here is a section: a study in, a `Section` or None out."""

from __future__ import annotations

from upcycle.reporting.document import Document
from upcycle.reporting.sections import built, losses, routers, similarity, speed, summary, tasks
from upcycle.reporting.study import Study

ORDER = (summary, built, losses, tasks, routers, similarity, speed)


def document(study: Study, title: str) -> Document:
    """The whole report; a section that has nothing to show is left out."""
    made = [part.section(study) for part in ORDER]
    return Document(title=title, sections=tuple(section for section in made if section is not None))
