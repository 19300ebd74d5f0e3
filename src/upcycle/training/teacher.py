"""The dense model that a run learns from: whether it fits, its weights, and what it says about a batch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from upcycle import loading
from upcycle.checkpoints import vocabularies
from upcycle.checkpoints.hub import Opener
from upcycle.data.feeding import Feed
from upcycle.dense.admission import admit
from upcycle.dense.source import Dense
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.hf import carriers, distributing, packing
from upcycle.hf.heads import Head
from upcycle.tasks import Batch, Question, Task
from upcycle.tensors.entries import Entry
from upcycle.training import config_hashes, kept_logits, together
from upcycle.training.distillation import Largest, Lesson, Unheaded, Whole
from upcycle.training.hashing import hashes_of
from upcycle.training.kept_logits import Arrays
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run

if TYPE_CHECKING:
    from upcycle.training.start import Start

LABEL = "teacher"  # of its checkpoint, in errors and in the hashes of a run


def admitted(run: Run, opener: Opener) -> Dense | None:
    """Return the teacher of a run, read from headers alone; None if it has none."""
    if run.teacher is None:
        return None
    return admit(opener(run.teacher.source, label=LABEL), drop=run.teacher.drop)


def refuse_other(run: Run, task: Task, taught: Subject, teacher: Dense | None) -> None:
    """Refuse a teacher whose probabilities are not of the same words, or that cannot read the rows."""
    if teacher is None or run.teacher is None:
        return
    subject, source = Subject.of_dense(teacher), run.teacher.source
    if not task.by_token:
        raise UpcycleError(
            f"[teacher] is for tasks that predict every token, and the task is {task.name}; take it out"
        )
    if not subject.architecture.endswith(task.heads):
        raise UpcycleError(
            f"teacher.source = {source} is a {subject.architecture}, which does not do the task {task.name}; "
            f"give a class that ends in {' or '.join(task.heads)}"
        )
    if subject.vocab_size != taught.vocab_size:
        raise UpcycleError(
            f"teacher.source = {source} has a vocabulary of {subject.vocab_size} tokens and the model one of "
            f"{taught.vocab_size}; a teacher must have the same, token by token"
        )
    if (why := vocabularies.difference(subject.folder, taught.folder)) is not None:
        raise UpcycleError(
            f"teacher.source = {source} and the model {why}; a teacher must have the same vocabulary, token "
            f"by token"
        )
    if (count := run.teacher.top_logits) is not None and count > subject.vocab_size:
        raise UpcycleError(
            f"teacher.top_logits = {count} and the vocabulary has {subject.vocab_size} tokens; give fewer"
        )
    if (long := task.beyond_positions(run.train.sequence_length, subject)) is not None:
        raise UpcycleError(f"teacher.source = {source}: {long}")
    if run.data.isolate and (joined := subject.tells_apart(run.train.sequence_length)) is not None:
        raise UpcycleError(
            f"data.isolate = true: the teacher {source} cannot keep the documents of a row apart, because "
            f"{joined}; set it to false"
        )


def model_of(
    dense: Dense, ranks: Ranks, precision: str, entries: Mapping[str, Entry] | None = None
) -> PreTrainedModel:
    """Build the teacher without gradients, shared out as the run's layout says; it has no experts.

    `entries` are its tensors, if they are not those of its checkpoint.
    """
    model = loading.build(
        dense.architecture,
        dict(dense.checkpoint.config),
        entries or dense.entries,
        distributed_config=None if ranks.config is None else replace(ranks.config, ep_size=1),
        dtype=torch.float32 if precision == "float32" else torch.bfloat16,
    )
    if model.device != ranks.device:
        model = model.to(ranks.device)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    carriers.install(model, carriers.layers_of(model, dense.family, dense.config))
    return model.requires_grad_(False).eval()


class Teaching(Protocol):
    """A teacher in training: beside the model, or what is kept of it."""

    def beside(self, batch: Arrays) -> Arrays:
        """Return a batch of the data with what the teacher's lesson needs of it."""

    def lesson(self, question: Question, batch: Batch, *, in_chunks: bool) -> Lesson:
        """Return what the teacher says about every token of a question, in their order.

        With `in_chunks`, logits are computed when they are asked for, if no ranks share the teacher.
        """


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A teacher that is in memory and reads each batch."""

    model: PreTrainedModel

    def beside(self, batch: Arrays) -> Arrays:
        return batch

    @torch.no_grad()
    def lesson(self, question: Question, batch: Batch, *, in_chunks: bool) -> Lesson:
        head = Head.of(self.model) if in_chunks else None
        found: Lesson
        if head is not None:
            with self._told(question) as inputs:
                states = self.model.base_model(**inputs).last_hidden_state
            found = Unheaded(states=states.flatten(0, -2).to(head.weight.dtype), head=head)
        else:
            found = Whole(logits=self.logits(question))
        return found

    def logits(self, question: Question) -> Tensor:
        """Return all of its logits, [T, V]."""
        with self._told(question) as inputs:
            logits: Tensor = self.model(**inputs).logits
        distributing.put_shards_back(self.model)  # there is no backward pass that would
        return logits.flatten(0, -2)

    def _told(self, question: Question) -> AbstractContextManager[dict[str, Any]]:
        return packing.told(self.model, question.inputs, question.positions)


def teaching(
    run: Run, begun: Start, task: Task, feed: Feed, ranks: Ranks, *, precision: str, steps: int
) -> Teaching | None:
    """Return the teacher of a run for the next `steps` steps of its feed; None if it has none."""
    if begun.teacher is None or run.teacher is None:
        return None
    dense, asked = begun.teacher, run.teacher

    def build() -> PreTrainedModel:
        return together.by_each(lambda: model_of(dense, ranks, precision), ranks)

    if asked.top_logits is None:
        return Beside(model=build())
    count, temperature = asked.top_logits, asked.temperature

    @torch.no_grad()
    def say(model: PreTrainedModel, rows: Arrays) -> Largest:
        question = task.question(kept_logits.on(ranks.device, rows), begun.subject, training=True)
        return Largest.of(Beside(model=model).logits(question), count, temperature)

    about = {
        "files": hashes_of([dense.checkpoint], ranks)[dense.checkpoint.label],
        "config": config_hashes.of_config(dense.checkpoint.config),
        "top_logits": count, "temperature": temperature, "precision": precision, "task": task.name,
        "sequence_length": run.train.sequence_length, "isolate": run.data.isolate,
    }  # fmt: skip
    maker = kept_logits.Maker(
        folder=Path(asked.cache or Path(run.out) / "teacher"),
        about=about,
        length=run.train.sequence_length,
        count=count,
        vocabulary=Subject.of_dense(dense).vocab_size,
        ranks=ranks,
        rows=min(run.train.micro_batch or run.train.rows, run.train.rows // ranks.dp_size),
    )
    return maker.kept(feed, steps, run.train.rows, build, say)
