"""The images or texts that `calibrate`, `inspect` and `verify` show a model, read by number.

A class with a head gets the inputs of its training task, without augmentation: T5 gets corrupted spans, BERT
masked tokens, and a text classifier padded texts. A class without a head gets whole images or packed rows of
text, and so does a text classifier on a text without labels.
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

LENGTH = 512  # tokens per row of text, if the model takes that many


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a data set, with random access."""

    count: int
    about: Mapping[str, Any]  # identifies the rows
    read: Callable[[np.ndarray], dict[str, np.ndarray]]  # maps row numbers, int64 [B], to arrays [B, ...]
    ask: Callable[[Batch], Question]
    task: Task | None  # computes the loss of the rows; None: the class has no head

    def real(self, inputs: Mapping[str, Any], stacks: Sequence[str]) -> dict[str, Tensor | None]:
        """Return the mask of real tokens for each stack, [B, L]; None if there is no padding."""
        names = {"decoder": "decoder_attention_mask"}
        return {stack: inputs.get(names.get(stack, "attention_mask")) for stack in stacks}


def of_images(path: Path, subject: Subject, cache: Path, *, gradient: bool, seed: int) -> Rows:
    """Return the images at `path`, normalised as the model expects.

    `gradient` requires labels that fit the head. Raises `UpcycleError` for a model that reads no images, and
    for `gradient` without a head.
    """
    if "image_size" not in subject.settings:
        raise UpcycleError(f"{subject.architecture} reads text and no images; give --text PATH")
    feeding = Feeding.of_file(path, length=LENGTH, cache=cache, seed=seed)  # images have no length
    return _rows(feeding, "images", path, subject, gradient=gradient)


def of_text(
    path: Path, subject: Subject, cache: Path, *, gradient: bool, seed: int, length: int | None
) -> Rows:
    """Return the text at `path` in rows of `length` tokens.

    A `length` of None means the model's maximum, up to `LENGTH`. Raises `UpcycleError` for a model that reads
    images, and for `gradient` without a head or labels.
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
    """Return the task whose rows this class without a head can read; None if there is none."""
    found = map(tasks.find, tasks.names())
    return next((task() for task in found if task.bodies and architecture.endswith(task.bodies)), None)


_WITHOUT_HEAD: Mapping[str, type[Task]] = {"images": ImageClassification, "text": Plain}
