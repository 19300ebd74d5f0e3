"""What tasks over labelled examples ask of a run and its model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.errors import UpcycleError
from upcycle.training.examples import Labelled
from upcycle.training.tasks import Task

if TYPE_CHECKING:
    from upcycle.subject import Subject
    from upcycle.training.run import Run


def only_source(run: Run, task: Task) -> str:
    """The path of the run's one source of examples."""
    if len(run.data.sources) != 1:
        what = task.name.replace("_", " ")
        raise UpcycleError(f"{what} takes one [[data.sources]]; there are {len(run.data.sources)}")
    return run.data.sources[0].path


def refuse_more_classes(found: Labelled, subject: Subject) -> None:
    """Refuse examples of more classes than the model's head has."""
    if found.num_labels > subject.num_labels:
        raise UpcycleError(
            f"{found.name} has {found.num_labels} classes and its head {subject.num_labels} (id2label in its "
            f"config.json); give data of its classes, or a source with a head for these"
        )
