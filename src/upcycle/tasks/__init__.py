"""What a model is trained to do. One file here is one task: its keys, its data, its question and its loss.

A file `NAME.py` defines a frozen dataclass deriving from `Task`, bound to the module name `task`; its fields
are the keys of `[task] name = "NAME"`. Letters: B rows, L tokens of a row, V classes or words.
"""

from __future__ import annotations

import abc
import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from upcycle import recipe, registry
from upcycle.data.corruption import IGNORED
from upcycle.errors import UpcycleError

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.dense.subject import Subject
    from upcycle.training.run import Run

Batch = dict[str, "Tensor"]  # tensors of the same rows


class Feed(Protocol):
    """Where the rows of a run come from, in an order that can be gone on with."""

    def next(self, rows: int, part: slice = slice(None)) -> dict[str, np.ndarray]:
        """The next `rows` rows, of which those of `part` are read."""

    def held_out(self, rows: int | None = None) -> dict[str, np.ndarray]:
        """Rows that are never trained on, always the same; at most `rows`."""

    def state(self) -> dict[str, Any]:
        """The position, as JSON has it."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position."""


@dataclass(frozen=True)
class Question:
    """What a model is given, and what it should answer: labels [B, ...], or [B, V] where they are soft."""

    inputs: dict[str, Any]
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """A way to train. Losses and right answers are sums over targets, so that parts of a batch add up."""

    summary: ClassVar[str]
    heads: ClassVar[tuple[str, ...]]  # how the names of the classes that can do it end
    classes: int | tuple[str, ...] = (
        0  # of a head made anew: their names, or how many; 0: the checkpoint's head
    )
    unit: ClassVar[str] = "token"  # what a loss is the mean over
    by_example: ClassVar[bool] = False  # whether rows are examples, not pieces of a text
    counting: ClassVar[Mapping[str, Any]] = {}  # what spares work where only routers are watched

    def __post_init__(self) -> None:
        given = self.classes if isinstance(self.classes, tuple) else ()
        if len({*given}) < len(given) or (isinstance(self.classes, int) and self.classes < 0):
            raise UpcycleError("task.classes is a number of classes or a list of different names")

    @property
    def name(self) -> str:
        """The name in the run file: that of the file."""
        return type(self).__module__.rpartition(".")[2]

    def notes(self) -> list[str]:
        """What a person should know of a run that does it, a sentence each."""
        return []

    @abc.abstractmethod
    def feed(self, run: Run, subject: Subject, out: Path) -> Feed:
        """The rows of the run; the first process calls it before the others do."""

    @abc.abstractmethod
    def question(self, batch: Batch, subject: Subject, *, training: bool) -> Question:
        """What the model is asked about a batch."""

    @abc.abstractmethod
    def targets(self, batch: Batch) -> int:
        """How many predictions a batch is."""

    @abc.abstractmethod
    def lengths(self, run: Run, subject: Subject) -> dict[str, int]:
        """Tokens of a row in each stack of blocks."""

    def beyond_positions(self, run: Run, subject: Subject) -> str | None:
        """What is wrong with rows that are longer than the model was made for, in a sentence."""
        return None

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy in nats, summed over targets, in float32 at least."""
        import torch
        import torch.nn.functional as F  # noqa: N812

        wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
        soft = labels.is_floating_point()
        flat = labels.flatten(0, -2) if soft else labels.flatten()
        return F.cross_entropy(wide, flat, reduction="sum", ignore_index=IGNORED)

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How many targets the largest logit is right about."""
        return (logits.argmax(-1) == labels).sum()


def read(table: Mapping[str, Any]) -> Task:
    """The task of a table with `name` and its keys."""
    options = dict(table)
    name = options.pop("name", None)
    if name is None:
        raise UpcycleError(f"[task] has no name; allowed: {', '.join(names())}")
    made: Task = recipe.read(find(name), options, f"task ({name})")
    return made


def of(architecture: str) -> Task:
    """The task that a class of transformers is made for."""
    for name in names():
        found = find(name)
        if architecture.endswith(found.heads):
            made: Task = found()
            return made
    raise UpcycleError(
        f"{architecture} has no head to train; take a checkpoint of one of: "
        f"{', '.join(head for name in names() for head in find(name).heads)}"
    )


def fitting(task: Task | None, architecture: str) -> Task:
    """`task`, if the class can do it; where it is None, the one that the class is made for."""
    if task is not None and not architecture.endswith(task.heads):
        raise UpcycleError(
            f"task.name = {task.name} is for models that end in {' or '.join(task.heads)}, and the source is "
            f"a {architecture}; take [task] out, or give another source"
        )
    return task or of(architecture)


def as_table(task: Task) -> dict[str, Any]:
    """The settings as a table: what `read` takes."""
    return {"name": task.name, **dataclasses.asdict(task)}


def find(name: str) -> type[Task]:
    """The task called `name`."""
    return registry.find(sys.modules[__name__], name, "task", "task")


def names() -> list[str]:
    """The names of all tasks."""
    return registry.names(sys.modules[__name__])
