"""Images or texts as a dense model's task makes them, by number: what a calibration shows the model.

A class with a head gets what it is asked in training, without augmentation (T5 corrupted spans, BERT masked
tokens, a classifier of texts padded ones); a class without one, and a text file where labels are not needed,
whole images or packed rows of text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from upcycle import tasks
from upcycle.data.examples import Examples
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.tasks import Batch, Question, Task
from upcycle.tasks._tokens import TokenFeed, refuse_beyond_positions
from upcycle.tasks.causal_lm import CausalLM
from upcycle.tasks.image_classification import ImageClassification
from upcycle.tasks.span_corruption import SpanCorruption
from upcycle.tasks.text_classification import TextClassification
from upcycle.tensors import rng
from upcycle.training.run import Run

LENGTH = 512  # tokens of a row of text, where the model takes as many


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a set, of which any can be read."""

    count: int
    about: Mapping[str, Any]  # what they are, to tell them from others
    read: Callable[[np.ndarray], dict[str, np.ndarray]]
    ask: Callable[[Batch], Question]
    task: Task | None  # whose loss there is; None: the class has no head

    def real(self, inputs: Mapping[str, Any], stacks: Sequence[str]) -> dict[str, Tensor | None]:
        """Which tokens are no padding, for each stack; None: all."""
        names = {"decoder": "decoder_attention_mask"}
        return {stack: inputs.get(names.get(stack, "attention_mask")) for stack in stacks}


def of_images(path: Path, subject: Subject, cache: Path, *, gradient: bool, seed: int) -> Rows:
    """The images at `path`, normalised as the model was made with."""
    task = task_of(subject)
    if "image_size" not in subject.settings:
        raise UpcycleError(f"{subject.architecture} reads text and no images; give --text PATH")
    _refuse_gradient(task, subject, gradient)
    shown = ImageClassification()
    images = shown.images(str(path), subject, cache, any_classes=not gradient)
    return _rows(Examples(images, None, held_out_share=0.0, seed=seed), "images", path, subject, shown, task)


def of_text(
    path: Path, subject: Subject, cache: Path, *, gradient: bool, seed: int, length: int | None
) -> Rows:
    """The text at `path` in rows of `length` tokens; None: as many as the model takes, at most `LENGTH`."""
    if "image_size" in subject.settings:
        raise UpcycleError(f"{subject.architecture} reads images and no text; give --images PATH")
    task = task_of(subject)
    if isinstance(task, TextClassification) and path.suffix in (".txt", ".text"):
        task = None
    _refuse_gradient(task, subject, gradient)
    run = Run.of(
        {
            "source": str(subject.folder),
            "out": str(cache),
            "seed": seed,
            "data": {"sources": [{"path": str(path)}], "cache": str(cache)},
            "train": {"steps": 1, "batch_size": 1, "sequence_length": length or min(LENGTH, subject.length)},
            "schedule": {"peak": 0.0},
        }
    )
    shown = task or (SpanCorruption() if subject.architecture.endswith(("T5Model",)) else Plain())
    feed = shown.feed(run, subject, cache)
    assert isinstance(feed, (TokenFeed, Examples))
    return _rows(feed, "text", path, subject, shown, task)


def _rows(
    feed: TokenFeed | Examples, kind: str, path: Path, subject: Subject, shown: Task, task: Task | None
) -> Rows:
    state = {key: value for key, value in feed.state().items() if key not in ("sample", "consumed")}
    return Rows(
        count=sum(feed.trainable),
        about={"kind": kind, "name": path.name, "shown": shown.name, **state},
        read=feed.at,
        ask=lambda batch: shown.question(batch, subject, training=False),
        task=task,
    )


class Plain(CausalLM):
    """Packed rows of text as they are."""

    @property
    def name(self) -> str:
        return "plain"

    def feed(self, run: Run, subject: Subject, out: Path) -> TokenFeed:
        refuse_beyond_positions(run, subject)
        return TokenFeed(run, subject, out, run.train.sequence_length, _as_they_are)

    def question(self, batch: Batch, subject: Subject, *, training: bool) -> Question:
        return Question({"input_ids": batch["rows"][:, :-1]}, batch["rows"][:, 1:])


def _as_they_are(rows: np.ndarray, keys: Sequence[rng.Key]) -> dict[str, np.ndarray]:
    return {"rows": rows}


def task_of(subject: Subject) -> Task | None:
    """The task that the class is made for, if there is one."""
    heads = [tasks.find(name).heads for name in tasks.names()]
    known = any(subject.architecture.endswith(head) for head in heads)
    return tasks.of(subject.architecture) if known else None


def _refuse_gradient(task: Task | None, subject: Subject, gradient: bool) -> None:
    if gradient and task is None:
        raise UpcycleError(
            f"--collect gradient wants a loss: {subject.architecture} has no head for one, or its data no "
            f"labels; leave gradient out, or give a checkpoint with a head and data for it"
        )
