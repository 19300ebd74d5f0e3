"""The dense model that a run learns from: whether it fits, its weights, and what it says about a batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from upcycle import loading
from upcycle.blueprints.entries import Entry
from upcycle.checkpoints import vocabularies
from upcycle.checkpoints.hub import open_checkpoint
from upcycle.dense.source import Dense, admit
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.hf.heads import Head
from upcycle.tasks import Question, Task
from upcycle.training.distillation import Lesson, Unheaded, Whole
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run

LABEL = "teacher"  # of its checkpoint, in errors and in the hashes of a run


def admitted(run: Run) -> Dense | None:
    """Return the teacher of a run, read from headers alone; None if it has none."""
    return None if run.teacher is None else admit(open_checkpoint(run.teacher.source, label=LABEL))


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
    if (long := task.beyond_positions(run.train.sequence_length, subject)) is not None:
        raise UpcycleError(f"teacher.source = {source}: {long}")
    if run.data.isolate and (joined := subject.tells_apart(run.train.sequence_length)) is not None:
        raise UpcycleError(
            f"data.isolate = true: the teacher {source} cannot keep the documents of a row apart, because "
            f"{joined}; set it to false"
        )


def model_of(dense: Dense, ranks: Ranks, precision: str) -> PreTrainedModel:
    """Build the teacher without gradients, shared out as the run's layout says; it has no experts."""
    model = loading.build(
        dense.architecture,
        dict(dense.checkpoint.config),
        {name: Entry(tensor, tensor.dtype) for name, tensor in dense.tensors.items()},
        distributed_config=None if ranks.config is None else replace(ranks.config, ep_size=1),
        dtype=torch.float32 if precision == "float32" else torch.bfloat16,
    )
    if model.device != ranks.device:
        model = model.to(ranks.device)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.requires_grad_(False).eval()


@torch.no_grad()
def lesson(model: PreTrainedModel, question: Question, *, in_chunks: bool) -> Lesson:
    """Return what the teacher says about every token of a question, in their order.

    With `in_chunks`, its logits are computed when they are asked for, if its head is a linear map.
    """
    head = Head.of(model) if in_chunks else None
    found: Lesson
    if head is not None:
        states = model.base_model(**question.inputs).last_hidden_state
        found = Unheaded(states=states.flatten(0, -2).to(head.weight.dtype), head=head)
    else:
        found = Whole(logits=model(**question.inputs).logits.flatten(0, -2))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # there is no backward pass that would
    return found
