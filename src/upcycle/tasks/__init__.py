"""What a model is trained to do. One file here is one task: its keys, data, question and loss, and its score.

A file `NAME.py` defines a frozen dataclass deriving from `Task`, bound to the module name `task`; its fields
are the keys of `[task] name = "NAME"`. Letters: B rows, L tokens of a row, V classes or words.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, TypeVar

from upcycle import settings
from upcycle.data.corruption import IGNORED
from upcycle.data.feeding import Feed, Feeding
from upcycle.errors import UpcycleError
from upcycle.settings import AtLeast, Named

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.dense.subject import Subject

Batch = dict[str, "Tensor"]  # tensors of the same rows
Found = TypeVar("Found", covariant=True)


@dataclass(frozen=True)
class Question:
    """What a model is given, and what it should answer: labels [B, ...], or [B, V] where they are soft."""

    inputs: dict[str, Any]
    labels: Tensor


class Judge(Protocol[Found]):
    """One checkpoint that is being scored, and the ways to score it. A task chooses one."""

    def rows(self, task: Task, path: Path) -> Found:
        """The loss and the right answers of every row that the task makes of the data at `path`."""

    def windows(self, path: Path) -> Found:
        """The likelihood of every token of the text at `path`, in windows that go over its documents."""


@dataclass(frozen=True, kw_only=True)
class Task(Named, abc.ABC):
    """A way to train. Losses and right answers are sums over targets, so that parts of a batch add up."""

    section: ClassVar[str] = "task"
    package: ClassVar[str] = __name__

    summary: ClassVar[str]
    heads: ClassVar[tuple[str, ...]]  # how the names of the classes that can do it end
    # of a head made anew: their names, or how many; 0: the checkpoint's head
    classes: Annotated[int, AtLeast(0)] | tuple[str, ...] = 0
    bodies: ClassVar[tuple[str, ...]] = ()  # how the names of classes without a head end that read its rows
    reads: ClassVar[Literal["text", "images"]] = "text"  # the option of `eval` that gives its data
    cache_name: ClassVar[str] = "tokens"  # of the folder of prepared files in that of a run
    unit: ClassVar[str] = "token"  # what a loss is the mean over
    by_example: ClassVar[bool] = False  # whether rows are examples, not pieces of a text
    counting: ClassVar[Mapping[str, Any]] = {}  # what spares work where only routers are watched

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.classes if isinstance(self.classes, tuple) else ()
        if len({*given}) < len(given):
            raise UpcycleError("task.classes is a number of classes or a list of different names")

    def notes(self) -> list[str]:
        """What a person should know of a run that does it, a sentence each."""
        return []

    @abc.abstractmethod
    def feed(self, feeding: Feeding, subject: Subject) -> Feed:
        """The rows of the data. Of several processes, the first one calls it before the others do.

        Raises `UpcycleError` for data that the task or the model cannot read.
        """

    def shown(self, feeding: Feeding, subject: Subject, *, labels: bool) -> Feed:
        """The rows for a model that is only watched; their labels must fit its head only if `labels`."""
        return self.feed(feeding, subject)

    def can_read(self, path: Path) -> bool:
        """Whether a file may hold what the task reads, going by its name."""
        return True

    @abc.abstractmethod
    def question(self, batch: Batch, subject: Subject, *, training: bool) -> Question:
        """What the model is asked about a batch."""

    @abc.abstractmethod
    def targets(self, batch: Batch) -> int:
        """How many predictions a batch is."""

    @abc.abstractmethod
    def lengths(self, length: int, subject: Subject) -> dict[str, int]:
        """Tokens of a row in each stack of blocks, if text is cut into rows of `length` tokens."""

    def beyond_positions(self, length: int, subject: Subject) -> str | None:
        """A sentence on rows that are longer than the model was made for; None if they are not."""
        return None

    def unscored(self, architecture: str) -> str | None:
        """A sentence on why `eval` cannot score a model of the class; None if it can."""
        return None

    def score(self, judge: Judge[Found], path: Path) -> Found:
        """Score a checkpoint on the data at `path`: row by row, unless a task knows a better way."""
        return judge.rows(self, path)

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
    return settings.read(Task, table, "task")


def known(architecture: str) -> Task | None:
    """The task that a class of transformers is made for; None for a class without a head that is known."""
    return next((task() for task in map(find, names()) if architecture.endswith(task.heads)), None)


def of(architecture: str) -> Task:
    """The task that a class of transformers is made for. Raises `UpcycleError` if there is none."""
    if (found := known(architecture)) is not None:
        return found
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
    return task.as_table()


def find(name: str) -> type[Task]:
    """The task called `name`."""
    return Task.find(name)


def names() -> list[str]:
    """The names of all tasks."""
    return Task.names()
