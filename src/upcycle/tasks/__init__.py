"""Training tasks. Each file here is one: its keys, data, model inputs, loss and score.

A file `NAME.py` defines a frozen dataclass derived from `Task` and binds it to the module name `task`; its
fields are the keys of `[task] name = "NAME"`. Letters: B rows, L tokens per row, V classes or words.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, TypeVar

from upcycle import settings
from upcycle.data.corpus import Data
from upcycle.data.corruption import IGNORED
from upcycle.data.feeding import Feed, Feeding
from upcycle.errors import UpcycleError
from upcycle.settings import AtLeast, Named
from upcycle.tasks._positions import beyond_positions

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.dense.subject import Subject

Batch = dict[str, "Tensor"]  # tensors with the same rows
POSITIONS = "positions"  # in a batch: positions that start anew at each document of a row
ON_HOST = "positions_on_host"  # the same on the host, for what must not ask the device where documents begin
Found = TypeVar("Found", covariant=True)


@dataclass(frozen=True)
class Question:
    """The model's inputs and the labels it should predict: [B, ...], or [B, V] for soft labels."""

    inputs: dict[str, Any]
    labels: Tensor
    positions: Tensor | None = None  # those of the inputs, on the host if they are there, [B, L]


class Judge(Protocol[Found]):
    """A checkpoint to score, and the ways to score it. A task chooses one of them."""

    def rows(self, task: Task, path: Path) -> Found:
        """Score every row that the task makes of the data at `path`, by loss and by right answers."""

    def windows(self, path: Path) -> Found:
        """Score the likelihood of every token of the text at `path`, in windows over its documents."""


@dataclass(frozen=True, kw_only=True)
class Task(Named, abc.ABC):
    """A training task. Losses and right answers are sums over targets, so that parts of a batch add up."""

    section: ClassVar[str] = "task"
    package: ClassVar[str] = __name__

    summary: ClassVar[str]
    heads: ClassVar[tuple[str, ...]]  # name endings of the model classes for this task
    # classes of a head that replaces a classifier's, as names or as a number; 0: keep the checkpoint's head
    classes: Annotated[int, AtLeast(0)] | tuple[str, ...] = 0
    auto: ClassVar[str | None] = None  # transformers' class that gives any body a new head for this task
    bodies: ClassVar[tuple[str, ...]] = ()  # name endings of classes without a head that read its rows
    reads: ClassVar[Literal["text", "images", "chats"]] = "text"  # the option of `eval` that gives its data
    cache_name: ClassVar[str] = "tokens"  # name of the folder of prepared files in a run's folder
    unit: ClassVar[str] = "token"  # the unit that a loss is averaged over
    by_example: ClassVar[bool] = False  # whether rows are examples, not pieces of a text
    splits: ClassVar[bool] = False  # whether held-out rows are drawn (data.split_seed) if there is no `test`
    counting: ClassVar[Mapping[str, Any]] = {}  # model arguments that save work if only routers are watched

    isolates: ClassVar[bool] = False  # whether documents in a row can be kept apart (data.isolate)
    in_windows: ClassVar[bool] = False  # whether `eval` scores a text in windows, and not row by row
    by_token: ClassVar[bool] = False  # whether the head predicts a word at every position of the last stack

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.classes if isinstance(self.classes, tuple) else ()
        if len({*given}) < len(given):
            raise UpcycleError("task.classes is a number of classes or a list of different names")
        if self.own_test == "":
            raise UpcycleError('task.test = "" names no set; give one to score on, or leave it out')

    @property
    def own_test(self) -> str | None:
        """The set that the model is scored on, if the task has the key `test` and it is set."""
        return getattr(self, "test", None)

    @property
    def remedy(self) -> str:
        """What a user can do about a source without a head for this task."""
        if self.auto is None:
            return "give another source"
        return (
            f"open it with transformers.{self.auto}.from_pretrained(SOURCE, num_labels=N), save it (and its "
            f"tokenizer), and give that folder as the source"
        )

    def notes(self) -> list[str]:
        """Return notes for the user about a run of this task, one sentence each."""
        return []

    @abc.abstractmethod
    def feed(self, feeding: Feeding, subject: Subject) -> Feed:
        """Prepare the rows of the data. With several processes, the first one calls it before the others.

        Raises `UpcycleError` for data that the task or the model cannot read.
        """

    def shown(self, feeding: Feeding, subject: Subject, *, labels: bool) -> Feed:
        """Prepare rows for a model that is only watched. Labels must fit its head only if `labels` is set."""
        return self.feed(feeding, subject)

    def objection(self, data: Data) -> str | None:
        """Return a sentence about [data] that would not be used as it says; None if all of it would.

        A run that begins is refused, and one that goes on is warned.
        """
        return None

    def idle_split(self, data: Data) -> str | None:
        """Return a sentence about `data.split_seed` if it is set and draws nothing; None otherwise."""
        if data.split_seed is None or (self.splits and self.own_test is None):
            return None
        why = f"{self.name} holds out the end of each source" if not self.splits else "task.test is scored on"
        return f"data.split_seed = {data.split_seed} draws no held-out examples, because {why}; take it out"

    def continued(self, recorded: Mapping[str, Any]) -> Task:
        """Return the task of a run that goes on, with what an earlier version had instead of today's default.

        `recorded` is its table as the run has recorded it, which lacks keys that came later.
        """
        return self

    def can_read(self, path: Path) -> bool:
        """Return whether a file may hold data for this task, judging by its name."""
        return True

    def files(self) -> Mapping[str, str]:
        """Return the texts of files beside an exported model that are this task's, by their names."""
        return {}

    def end(self, tokenizer: Any) -> int | None:
        """Return the token that ends what the model learns to write; None: the tokenizer's end of a text."""
        return None

    @abc.abstractmethod
    def question(self, batch: Batch, subject: Subject, *, training: bool) -> Question:
        """Return the model's inputs and labels for a batch."""

    @abc.abstractmethod
    def targets(self, batch: Batch) -> int | Tensor:
        """Return the number of predictions in a batch.

        It is a tensor, [] of integers, if it depends on what is in the batch and not on its shape alone.
        """

    @abc.abstractmethod
    def lengths(self, length: int, subject: Subject) -> dict[str, int]:
        """Return the tokens of a row in each stack of blocks if text is cut into rows of `length` tokens.

        Raises `UpcycleError` for a model that reads no such rows.
        """

    def shapes(self, rows: int, length: int) -> dict[str, tuple[int, ...]] | None:
        """Return the shapes of a batch of `rows` rows of `length` tokens, all integers, by their names.

        None: only the data knows them. A dry run then takes no steps.
        """
        return None

    def beyond_positions(self, length: int, subject: Subject) -> str | None:
        """Return a sentence about rows that are too long for the model.

        None if they are not, or if the model reads no text; `lengths` refuses such a model.
        """
        texts = self.reads != "images" and subject.reads_text
        return beyond_positions(length, subject) if texts else None

    def unscored(self, architecture: str) -> str | None:
        """Return the reason why `eval` cannot score a model of this class; None if it can."""
        return None

    def score(self, judge: Judge[Found], path: Path) -> Found:
        """Score a checkpoint on the data at `path`, in windows or row by row."""
        return judge.windows(path) if self.in_windows else judge.rows(self, path)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy in nats, summed over targets, []. It is computed in float32 or wider."""
        import torch
        import torch.nn.functional as F  # noqa: N812

        wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
        soft = labels.is_floating_point()
        flat = labels.flatten(0, -2) if soft else labels.flatten()
        return F.cross_entropy(wide, flat, reduction="sum", ignore_index=IGNORED)

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the number of targets for which the largest logit is right, []."""
        return (logits.argmax(-1) == labels).sum()


def read(table: Mapping[str, Any]) -> Task:
    """Return the task that a table with `name` and its keys describes."""
    return settings.read(Task, table, "task")


def known(architecture: str) -> Task | None:
    """Return the task that a transformers class is made for; None if its head is unknown."""
    return next((task() for task in map(find, names()) if architecture.endswith(task.heads)), None)


def of(architecture: str) -> Task:
    """Return the task that a transformers class is made for. Raises `UpcycleError` if there is none."""
    if (found := known(architecture)) is not None:
        return found
    heads = dict.fromkeys(head for name in names() for head in find(name).heads)
    raise UpcycleError(
        f"{architecture} has no head to train; take a checkpoint of one of: {', '.join(heads)}"
    )


def fitting(task: Task | None, architecture: str) -> Task:
    """Return `task` if the class can do it; if it is None, the task that the class is made for.

    Raises `UpcycleError` if the class cannot do the task.
    """
    if task is not None and not architecture.endswith(task.heads):
        raise UpcycleError(
            f"task.name = {task.name} is for models that end in {' or '.join(task.heads)}, and the source is "
            f"a {architecture}; take [task] out, or {task.remedy}"
        )
    return task or of(architecture)


def as_table(task: Task) -> dict[str, Any]:
    """Return the settings as a table that `read` accepts."""
    return task.as_table()


def find(name: str) -> type[Task]:
    """Return the task called `name`."""
    return Task.find(name)


def names() -> list[str]:
    """Return the names of all tasks."""
    return Task.names()
