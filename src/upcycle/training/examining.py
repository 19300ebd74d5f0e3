"""The seam between training and those who score its model on tasks; training knows no evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from transformers import PreTrainedModel

from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.training import together
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run


class Examiner(ABC):
    """Scores the model of a run on the tasks of its [eval]."""

    @abstractmethod
    def refuse(self, run: Run, subject: Subject) -> None:
        """Raise `UpcycleError` if the tasks cannot be asked, as far as that is known without the hub."""

    @abstractmethod
    def prepare(self, run: Run, subject: Subject) -> None:
        """Read the data of the tasks, before the first step; the hub's are fetched.

        Raises `UpcycleError` if the tasks cannot be asked.
        """

    @abstractmethod
    def score(self, model: PreTrainedModel, run: Run, subject: Subject, here: Ranks) -> Mapping[str, float]:
        """Return the scores as `task/metric`; afterwards the model is in training mode.

        There are none if the model gives NaN. Every rank calls this, because each holds a part of the model.
        """


def prepared(run: Run, given: Examiner | None, subject: Subject, here: Ranks) -> Examiner | None:
    """Return who examines the model of a run, with the data of the tasks; None if nobody is asked to.

    Raises the same `UpcycleError` on all ranks if that is not possible.
    """
    if (examiner := asked(run, given)) is not None:
        together.first_alone(lambda: examiner.prepare(run, subject), here)
    return examiner


def refuse(run: Run, given: Examiner | None, subject: Subject) -> None:
    """Raise `UpcycleError` if the model of a run cannot be examined, see `Examiner.refuse`."""
    if (examiner := asked(run, given)) is not None:
        examiner.refuse(run, subject)


def asked(run: Run, given: Examiner | None) -> Examiner | None:
    """Return who examines the model of a run, without the data; None if nobody is asked to."""
    if not run.eval.tasks:
        return None
    if given is None:
        raise UpcycleError("eval.tasks are asked by `upcycle.train` and `upcycle train`; take one of them")
    return given
