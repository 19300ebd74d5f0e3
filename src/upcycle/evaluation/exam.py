"""Scores a model on tasks of lm-evaluation-harness while it is trained (`training/examining.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from upcycle.data import corpus
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.evaluation.batch_size import BatchSize
from upcycle.evaluation.language_model import SPEAKING, LanguageModel
from upcycle.evaluation.no_numbers import NoNumbersError
from upcycle.evaluation.scores import harness
from upcycle.hf import distributing
from upcycle.system import progress
from upcycle.training.examining import Examiner
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run


class HarnessExaminer(Examiner):
    """Asks what `upcycle eval --tasks` asks, with the same prompts and metrics.

    Ranks that share a model run the same calls in the same order on the same rows, so that their collectives
    meet; each of them works out all scores.
    """

    def __init__(self) -> None:
        self._exam: Any = None  # the tasks of the run with their data, which are read once

    def refuse(self, run: Run, subject: Subject) -> None:
        _refuse_mute(subject)
        if run.eval.task_files is None:
            harness().refuse_unknown(run.eval.tasks)
        else:
            _exam(run)

    def prepare(self, run: Run, subject: Subject) -> None:
        _refuse_mute(subject)
        self._exam = _exam(run)

    def score(self, model: PreTrainedModel, run: Run, subject: Subject, here: Ranks) -> Mapping[str, float]:
        words = corpus.tokenizer(run.data, subject.folder)
        language = LanguageModel.of(model, words, subject, batch_size=run.eval.batch_size)
        if here.world > 1:
            size = BatchSize.agreed(here.gathered(language.size))
            language = replace(language, size=size, shared=True)
        if self._exam is None:  # a run that has taken all its steps lacks its last scores
            self._exam = _exam(run)
        try:
            results = harness().score(language, self._exam)
        except NoNumbersError:  # a run that diverges goes on, and its held-out loss says so
            if here.first:
                progress.warn("the model gives NaN, so its tasks have no scores")
            return {}
        finally:
            distributing.put_shards_back(model)  # there is no backward pass that would
            model.train()
        return {
            f"{result.name}/{name}": metric.value
            for result in results
            for name, metric in result.metrics.items()
            if "part_of" not in result.more
        }


def _refuse_mute(subject: Subject) -> None:
    """Raise `UpcycleError` for a model that gives no text a likelihood."""
    if not subject.architecture.endswith(SPEAKING):
        raise UpcycleError(
            f"eval.tasks: {subject.architecture} gives no text a likelihood, and tasks ask for one; "
            f"leave them out"
        )


def _exam(run: Run) -> Any:
    """Return the tasks of a run with their data."""
    asked = run.eval
    folder = None if asked.task_files is None else Path(asked.task_files)
    return harness().exam(asked.tasks, folder, shots=asked.num_fewshot, limit=asked.limit)
