"""A model in training, and the losses and scores that it has on a question."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from upcycle.hf import heads, packing
from upcycle.hf.heads import Head
from upcycle.tasks import Batch, Question, Task
from upcycle.training import chunked_entropy, distillation
from upcycle.training.distillation import Losses
from upcycle.training.freezing import KeptExperts
from upcycle.training.parallel import Ranks
from upcycle.training.routing import Routers
from upcycle.training.run import Run
from upcycle.training.spikes import Recent
from upcycle.training.start import Start
from upcycle.training.teacher import Teaching


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model in training, with everything that a step needs."""

    model: PreTrainedModel
    task: Task
    start: Start
    optimizer: torch.optim.Optimizer
    routers: Routers | None
    run: Run
    ranks: Ranks
    precision: str
    kept: KeptExperts | None = None  # experts of trained stacks that are not trained
    recent: Recent | None = None  # the last steps, against which the next ones are judged
    teacher: Teaching | None = None

    @property
    def lengths(self) -> dict[str, int]:
        """The tokens of a row in each stack of blocks."""
        return self.task.lengths(self.run.train.sequence_length, self.start.subject)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context for bfloat16 arithmetic with float32 weights, unless FSDP2 does this itself."""
        if self.precision != "mixed" or self.ranks.dp_size > 1:
            return nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)

    def logits(self, question: Question, **options: Any) -> Tensor:
        """Return the model's logits for a question: [B, L, V], or [B, classes]."""
        with self._told(question) as inputs:
            out: Tensor = self.model(**inputs, **options).logits
        return out

    def entropy(self, question: Question) -> Tensor:
        """Return the cross-entropy in nats, summed over the targets of a question, []."""
        if not self._in_chunks(question):
            return self.task.loss(self.logits(question), question.labels)
        return self._without_logits(
            question, lambda hidden, head: chunked_entropy.cross_entropy(hidden, question.labels, head)
        )

    def losses(self, question: Question, batch: Batch) -> Losses:
        """Return the losses of a question about a batch: the cross-entropy, and the teacher's part."""
        settings = self.run.teacher
        if self.teacher is None or settings is None:
            entropy = self.entropy(question)
            return Losses(total=entropy, entropy=entropy)
        in_chunks = self._in_chunks(question)
        with self.autocast():
            lesson = self.teacher.lesson(question, batch, in_chunks=in_chunks)
        if not in_chunks:
            logits = self.logits(question).flatten(0, -2)
            return distillation.losses(logits, question.labels.flatten(), lesson, settings)
        found: list[Losses] = []

        def distilled(hidden: Tensor, head: Head) -> Tensor:
            found.append(chunked_entropy.distilled(hidden, question.labels, head, lesson, settings))
            return found[0].total

        total = self._without_logits(question, distilled)
        return replace(found[0], total=total)

    def scores(self, question: Question, rows: int) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy and the right answers of a question's first rows, [] each."""
        labels = question.labels[:rows]
        if not self._in_chunks(question):
            logits = self.logits(question)[:rows]
            return self.task.loss(logits, labels), self.task.correct(logits, labels)
        found: list[Tensor] = []

        def score(hidden: Tensor, head: Head) -> Tensor:
            loss, right = chunked_entropy.scores(hidden[:rows], labels, head)
            found.append(right)
            return loss

        return self._without_logits(question, score), found[0]

    def _in_chunks(self, question: Question) -> bool:
        """Return whether the logits are so many that they are computed in chunks.

        A teacher's are not compared with logits of which each rank has a part.
        """
        if not self.task.by_token or (self.teacher is not None and self.ranks.layout.tp > 1):
            return False
        words = heads.words(self.model)
        return words is not None and chunked_entropy.is_worth(question.labels.numel(), words)

    @contextmanager
    def _told(self, question: Question) -> Iterator[dict[str, Any]]:
        """Yield the inputs of the model for a question; inside, it knows which tokens see each other."""
        with self.autocast(), packing.told(self.model, question.inputs, question.positions) as inputs:
            yield inputs

    def _without_logits(self, question: Question, compute: Callable[[Tensor, Head], Tensor]) -> Tensor:
        with self._told(question) as inputs:
            return heads.without_logits(self.model, inputs, compute)
