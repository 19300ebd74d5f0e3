"""A model in training, and the losses and scores that it has on a question."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from upcycle.hf import packing
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
        with self.autocast(), packing.told(question.inputs):
            out: Tensor = self.model(**question.inputs, **options).logits
        return out

    def entropy(self, question: Question) -> Tensor:
        """Return the cross-entropy in nats, summed over the targets of a question, []."""
        if (head := self._head(question)) is None:
            return self.task.loss(self.logits(question), question.labels)
        with self.autocast(), packing.told(question.inputs):
            return chunked_entropy.cross_entropy(self._hidden(question), question.labels, head)

    def losses(self, question: Question, batch: Batch) -> Losses:
        """Return the losses of a question about a batch: the cross-entropy, and the teacher's part."""
        settings = self.run.teacher
        if self.teacher is None or settings is None:
            entropy = self.entropy(question)
            return Losses(total=entropy, entropy=entropy)
        head = self._head(question)
        with self.autocast(), packing.told(question.inputs):
            lesson = self.teacher.lesson(question, batch, in_chunks=head is not None)
            if head is not None:
                hidden = self._hidden(question)
                return chunked_entropy.distilled(hidden, question.labels, head, lesson, settings)
        logits = self.logits(question).flatten(0, -2)
        return distillation.losses(logits, question.labels.flatten(), lesson, settings)

    def scores(self, question: Question, rows: int) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy and the right answers of a question's first rows, [] each."""
        labels = question.labels[:rows]
        if (head := self._head(question)) is None:
            logits = self.logits(question)[:rows]
            return self.task.loss(logits, labels), self.task.correct(logits, labels)
        with self.autocast(), packing.told(question.inputs):
            return chunked_entropy.scores(self._hidden(question)[:rows], labels, head)

    def _head(self, question: Question) -> Head | None:
        """Return the model's head if its logits are so many that they are computed in chunks.

        Ranks that share the model have none. FSDP leaves a tied head whole after a score, and a base model
        that is called by itself would go past FSDP's hooks.
        """
        head = Head.of(self.model) if self.task.by_token and self.ranks.world == 1 else None
        return head if head and chunked_entropy.is_worth(question.labels.numel(), head) else None

    def _hidden(self, question: Question) -> Tensor:
        hidden: Tensor = self.model.base_model(**question.inputs).last_hidden_state
        return hidden
