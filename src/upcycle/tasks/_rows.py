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
from upcycle.data import corpus
from upcycle.data.documents import Source
from upcycle.data.feeding import Feeding
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError, shown
from upcycle.tasks import Batch, Question, Task
from upcycle.tasks._plain import Plain
from upcycle.tasks._positions import refuse_beyond_positions
from upcycle.tasks._tokens import refuse_sound
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

    def real(
        self, batch: Batch, inputs: Mapping[str, Any], stacks: Sequence[str]
    ) -> dict[str, Tensor | None]:
        """Return the mask of the tokens that count for each stack, [B, L]; None if all do.

        Padding does not. A batch can say itself which do, as `counted`.
        """
        if "counted" in batch:
            return dict.fromkeys(stacks, batch["counted"])
        names = {"decoder": "decoder_attention_mask"}
        return {stack: inputs.get(names.get(stack, "attention_mask")) for stack in stacks}


def of_images(path: Path, subject: Subject, cache: Path, *, gradient: bool, seed: int) -> Rows:
    """Return the images at `path`, normalised as the model expects.

    `gradient` requires labels that fit the head. Raises `UpcycleError` for a model that reads no images, and
    for `gradient` without a head.
    """
    refuse_sound(subject)
    if "image_size" not in subject.settings:
        raise UpcycleError(f"{subject.architecture} reads text and no images; give --text PATH")
    feeding = Feeding.of_file(path, length=LENGTH, cache=cache, seed=seed)  # images have no length
    return _rows(feeding, "images", path, subject, gradient=gradient)


def of_text(
    path: Path,
    subject: Subject,
    cache: Path,
    *,
    gradient: bool,
    seed: int,
    length: int | None,
    field: str = Source.field,
) -> Rows:
    """Return the text at `path` in rows of `length` tokens.

    A `length` of None means the model's maximum, up to `LENGTH`. Raises `UpcycleError` for a model that reads
    no text, for rows longer than its positions, and for `gradient` without a head or labels.
    """
    refuse_sound(subject)
    if "image_size" in subject.settings:
        raise UpcycleError(f"{subject.architecture} reads images and no text; give --images PATH")
    length = length or min(LENGTH, subject.length)
    feeding = Feeding.of_file(path, length=length, cache=cache, seed=seed, field=field)
    refuse_beyond_positions(length, subject, setting=feeding.setting)
    return _rows(feeding, "text", path, subject, gradient=gradient)


def of_prompts(prompts: Sequence[str], subject: Subject) -> Rows:
    """Return prompts, each a row with the special tokens that its tokenizer adds, padded on the right.

    Those special tokens do not count: the first token of a text is like no other, and the same for all.
    Raises `UpcycleError` for a model that reads sound, for a prompt without a token, and for one that is
    longer than the model's positions.
    """
    refuse_sound(subject)
    tokenizer = corpus.read_tokenizer(subject.folder)
    rows = [_prompt(prompt, tokenizer, subject) for prompt in prompts]
    made = {
        name: _padded([row[part] for row in rows]) for part, name in enumerate(("ids", "mask", "counted"))
    }
    return Rows(
        count=len(rows),
        about={"kind": "prompts"},
        read=lambda places: {name: each[places] for name, each in made.items()},
        ask=lambda batch: Question(
            {"input_ids": batch["ids"], "attention_mask": batch["mask"]}, batch["ids"]
        ),
        task=None,
    )


def _prompt(prompt: str, tokenizer: Any, subject: Subject) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ids of a prompt, ones, and which of the ids are its own; [L] each."""
    own, ids = (tokenizer(prompt, add_special_tokens=added).input_ids for added in (False, True))
    if not own:
        raise UpcycleError(f"the prompt {shown(prompt)} has no token; give a prompt with some text")
    if len(ids) > subject.length:
        raise UpcycleError(
            f"the prompt {shown(prompt)} has {len(ids):,} tokens and the model takes {subject.length:,}; "
            f"shorten it, or give it as a text, which is cut into rows"
        )
    at = next((i for i in range(len(ids) - len(own) + 1) if ids[i : i + len(own)] == own), None)
    counted = np.zeros(len(ids), np.int64)
    counted[slice(None) if at is None else slice(at, at + len(own))] = 1
    return np.array(ids, np.int64), np.ones(len(ids), np.int64), counted


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return rows of any length as one array, with zeros behind them."""
    out = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


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
