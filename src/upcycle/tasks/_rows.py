"""Images or texts as a model's task makes them, by number: what `calibrate`, `inspect` and `verify` show it.

A class with a head gets what it is asked in training, without augmentation. T5 gets corrupted spans, BERT
masked tokens, and a classifier of texts padded ones. A class without one gets whole images or packed rows of
text, and so does a classifier of texts that is shown a text without labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from upcycle import tasks
from upcycle.data.feeding import Feeding
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.tasks import Batch, Question, Task
from upcycle.tasks._plain import Plain
from upcycle.tasks.image_classification import ImageClassification

if TYPE_CHECKING:
    from torch import Tensor

LENGTH = 512  # tokens of a row of text, if the model takes as many


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a set, of which any can be read."""

    count: int
    about: Mapping[str, Any]  # what they are, to tell them from others
    read: Callable[[np.ndarray], dict[str, np.ndarray]]  # numbers of rows, int64 [B], to arrays [B, ...]
    ask: Callable[[Batch], Question]
    task: Task | None  # its loss is that of the rows; None: the class has no head

    def real(self, inputs: Mapping[str, Any], stacks: Sequence[str]) -> dict[str, Tensor | None]:
        """The tokens that are no padding, for each stack, [B, L]; None: all."""
        names = {"decoder": "decoder_attention_mask"}
        return {stack: inputs.get(names.get(stack, "attention_mask")) for stack in stacks}


def of_images(path: Path, subject: Subject, cache: Path, *, gradient: bool, seed: int) -> Rows:
    """The images at `path`, normalised as the model was made with.

    `gradient` asks for labels that fit the head. Raises `UpcycleError` for a model that reads no images, and
    for `gradient` without a head.
    """
    if "image_size" not in subject.settings:
        raise UpcycleError(f"{subject.architecture} reads text and no images; give --text PATH")
    feeding = Feeding.of_file(path, length=LENGTH, cache=cache, seed=seed)  # of text: images have none
    return _rows(feeding, "images", path, subject, gradient=gradient)


def of_text(
    path: Path, subject: Subject, cache: Path, *, gradient: bool, seed: int, length: int | None
) -> Rows:
    """The text at `path` in rows of `length` tokens; None: as many as the model takes, at most `LENGTH`.

    Raises `UpcycleError` for a model that reads images, and for `gradient` without a head or labels.
    """
    if "image_size" in subject.settings:
        raise UpcycleError(f"{subject.architecture} reads images and no text; give --images PATH")
    length = length or min(LENGTH, subject.length)
    feeding = Feeding.of_file(path, length=length, cache=cache, seed=seed)
    return _rows(feeding, "text", path, subject, gradient=gradient)


def _rows(
    feeding: Feeding, kind: Literal["text", "images"], path: Path, subject: Subject, *, gradient: bool
) -> Rows:
    task = tasks.known(subject.architecture)
    if task is not None and not task.can_read(path):
        task = None
    if gradient and task is None:
        raise UpcycleError(
            f"--collect gradient wants a loss: {subject.architecture} has no head for one, or its data no "
            f"labels; leave gradient out, or give a checkpoint with a head and data for it"
        )
    shown = task or _of_body(subject.architecture) or _WITHOUT_HEAD[kind]()
    feed = shown.shown(feeding, subject, labels=gradient)
    state = {key: value for key, value in feed.state().items() if key not in ("sample", "consumed")}
    return Rows(
        count=sum(feed.trainable),
        about={"kind": kind, "name": path.name, "shown": shown.name, **state},
        read=feed.at,
        ask=lambda batch: shown.question(batch, subject, training=False),
        task=task,
    )


def _of_body(architecture: str) -> Task | None:
    """The task whose rows a class without a head reads, if a task says that it does."""
    found = map(tasks.find, tasks.names())
    return next((task() for task in found if task.bodies and architecture.endswith(task.bodies)), None)


_WITHOUT_HEAD: Mapping[str, type[Task]] = {"images": ImageClassification, "text": Plain}
