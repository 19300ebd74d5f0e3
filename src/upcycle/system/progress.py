"""How long work reports on itself, and to whom.

A function that works for long tells a `Progress`. Nobody listens until a caller of the library passes one, or
listens with `reporting_to`: until then work is silent, and sentences go to the logger `upcycle`. Nothing here
draws. The listener is a context variable, because the work lies many calls below the function that a person
called, and no result depends on who listens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Literal, Protocol

Unit = Literal["bytes", "examples", "steps"]

_LOG = logging.getLogger("upcycle")


class Work(Protocol):
    """One piece of work while it goes on."""

    def total(self, n: int) -> None:
        """The work is `n` units long. Work that never says so has no known end."""

    def advance(self, n: int, note: str = "") -> None:
        """`n` more units are done; `note` says in a few words how things stand."""


class Progress(Protocol):
    """A listener: it shows work, or sentences, or nothing."""

    def work(
        self, what: str, unit: Unit, *, total: int | None = None, done: int = 0, every: int | None = None
    ) -> AbstractContextManager[Work]:
        """Work called `what` begins, and ends with the block.

        `done` of its `total` units are behind it already. A listener that writes lines writes one each
        `every` units, or as often as it likes where that is None.
        """

    def say(self, sentence: str) -> None:
        """Tell something that is good to know."""

    def warn(self, sentence: str) -> None:
        """Tell something that should not be overlooked."""


class Unheard:
    """The listener while there is no other: work is silent, sentences go to the logger `upcycle`."""

    @contextmanager
    def work(
        self, what: str, unit: Unit, *, total: int | None = None, done: int = 0, every: int | None = None
    ) -> Iterator[Work]:
        yield _SilentWork()

    def say(self, sentence: str) -> None:
        _LOG.info(sentence)

    def warn(self, sentence: str) -> None:
        _LOG.warning(sentence)


class _SilentWork:
    def total(self, n: int) -> None:
        pass

    def advance(self, n: int, note: str = "") -> None:
        pass


_UNHEARD = Unheard()
_listener: ContextVar[Progress] = ContextVar("upcycle_progress", default=_UNHEARD)


@contextmanager
def reporting_to(listener: Progress | None) -> Iterator[None]:
    """Everything in the block reports to `listener`; None leaves whoever listens already."""
    if listener is None:
        yield
        return
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def work(
    what: str, unit: Unit, *, total: int | None = None, done: int = 0, every: int | None = None
) -> AbstractContextManager[Work]:
    """Begin work for whoever listens; see `Progress.work`."""
    return _listener.get().work(what, unit, total=total, done=done, every=every)


def say(sentence: str) -> None:
    """Tell whoever listens something that is good to know."""
    _listener.get().say(sentence)


def warn(sentence: str) -> None:
    """Tell whoever listens something that should not be overlooked."""
    _listener.get().warn(sentence)
