"""A checkpoint to score, with the ways to score it that a task can choose from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from upcycle.dense.subject import Subject
from upcycle.evaluation import rows_scored, text
from upcycle.evaluation.language_model import LanguageModel
from upcycle.evaluation.results import Result
from upcycle.evaluation.to_score import ToScore
from upcycle.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A model, its tokenizer and the settings of the evaluation; `cache` is the folder of prepared files."""

    model: PreTrainedModel
    subject: Subject
    tokenizer: Any  # None if images are scored
    asked: ToScore
    cache: Path

    @cached_property
    def language(self) -> LanguageModel:
        """Return the model as a language model. Raises `UpcycleError` if its class is none."""
        return LanguageModel.of(self.model, self.tokenizer, self.subject, batch_size=self.asked.batch_size)

    def rows(self, task: Task, path: Path) -> Result:
        """Score the loss and the accuracy on every row that the task makes of the data at `path`."""
        return rows_scored.score(self.model, self.subject, task, path, self.asked, self.cache)

    def windows(self, path: Path) -> Result:
        """Score the likelihood of every token of the text at `path`, in windows over its documents."""
        return text.score(
            self.language, path, length=self.asked.length, stride=self.asked.stride, limit=self.asked.limit,
            separator=self.asked.separator, field=self.asked.field,
        )  # fmt: skip
