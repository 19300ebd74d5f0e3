"""Progress on standard error: bars on a terminal, and occasional lines in a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from upcycle.cli.screen import err
from upcycle.system.progress import Unit, Work
from upcycle.system.wording import size

EVERY = 10.0  # seconds between lines of progress, if no bar can be shown


class Bars:
    """A listener that shows all work and all messages on standard error."""

    def work(
        self, what: str, unit: Unit, *, total: int | None = None, done: int = 0, every: int | None = None
    ) -> AbstractContextManager[Work]:
        if err.is_terminal:
            return _drawn(what, unit, total, done)
        return _told(what, _SAID[unit], total, done, every)

    def say(self, sentence: str) -> None:
        err.print(sentence)

    def warn(self, sentence: str) -> None:
        err.print(f"[yellow]![/] {escape(sentence)}", markup=True)


_SAID: dict[Unit, Callable[[float], str]] = {
    "bytes": size,
    "examples": lambda n: f"{n:,}",
    "steps": lambda n: f"{n:,}",
}


def _counted(unit: Unit) -> tuple[ProgressColumn, ...]:
    """Return the columns that show how much is done."""
    if unit == "bytes":
        return DownloadColumn(), TransferSpeedColumn()
    if unit == "examples":
        return (MofNCompleteColumn(),)
    return TaskProgressColumn(), TextColumn("{task.fields[note]}")


@contextmanager
def _drawn(what: str, unit: Unit, total: int | None, done: int) -> Iterator[Work]:
    columns = (TextColumn("{task.description}"), BarColumn(), *_counted(unit), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(what, total=total, completed=done, note="")
        yield _Drawn(progress, task)


@dataclass
class _Drawn:
    progress: Progress
    task: TaskID

    def total(self, n: int) -> None:
        self.progress.update(self.task, total=n)

    def advance(self, n: int, note: str = "") -> None:
        fields: dict[str, Any] = {"note": note} if note else {}
        self.progress.update(self.task, advance=n, **fields)


@contextmanager
def _told(
    what: str, said: Callable[[float], str], total: int | None, done: int, every: int | None
) -> Iterator[Work]:
    if every is None:
        yield _ToldByTime(what, said, total or 0, done)
    else:
        yield _ToldByCount(what, total or 0, done, every)


@dataclass
class _ToldByTime:
    """Work shown as a line every `EVERY` seconds; short work shows none."""

    what: str
    said: Callable[[float], str]
    end: int
    done: int
    last: float = field(default_factory=lambda: time.monotonic())

    def total(self, n: int) -> None:
        self.end = n

    def advance(self, n: int, note: str = "") -> None:
        self.done += n
        if time.monotonic() - self.last >= EVERY:
            self.last = time.monotonic()
            of = f" of {self.said(self.end)}, {self.done / self.end:.0%}" if self.end else ""
            err.print(f"{self.what}: {self.said(self.done)}{of}", soft_wrap=True)


@dataclass
class _ToldByCount:
    """Work shown as a line every so many units and at the end, with the note and the time left."""

    what: str
    end: int
    done: int
    every: int
    last: float = field(default_factory=lambda: time.monotonic())

    def total(self, n: int) -> None:
        self.end = n

    def advance(self, n: int, note: str = "") -> None:
        now, before = time.monotonic(), self.last
        self.done, self.last = self.done + n, now
        if self.done % self.every == 0 or self.done == self.end:
            left = (self.end - self.done) * (now - before) / n
            err.print(f"{note or self.what}  {left:.0f} s left")
