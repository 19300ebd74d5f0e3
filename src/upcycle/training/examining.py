"""The seam between training and those who score its model on tasks; training knows no evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from transformers import PreTrainedModel

from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run


class Examiner(ABC):
    """Scores the model of a run on the tasks of its [eval]."""

    @abstractmethod
    def refuse(self, run: Run, subject: Subject) -> None:
        """Raise `UpcycleError` if the tasks cannot be asked, before the first step."""

    @abstractmethod
    def score(self, model: PreTrainedModel, run: Run, subject: Subject, here: Ranks) -> Mapping[str, float]:
        """Return the scores as `task/metric`; afterwards the model is in training mode.

        There are none if the model gives NaN. Every rank calls this, because each holds a part of the model.
        """


def examiner_of(run: Run, given: Examiner | None, subject: Subject) -> Examiner | None:
    """Return who examines the model of a run; None if nobody is asked to.

    Raises `UpcycleError` if that is not possible.
    """
    if not run.eval.tasks:
        return None
    if given is None:
        raise UpcycleError("eval.tasks are asked by `upcycle.train` and `upcycle train`; take one of them")
    given.refuse(run, subject)
    return given
