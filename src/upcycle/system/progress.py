"""Progress reports of long work, and the listener that receives them.

A function that takes long reports to a `Progress`. There is none until a caller of the library passes one, or
sets one with `reporting_to`: until then work is silent, and messages go to the logger `upcycle`. Nothing here
draws. The listener is a context variable because the work is many calls below the public function; no result
depends on the listener.
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
    """A piece of work in progress."""

    def total(self, n: int) -> None:
        """Set the length of the work to `n` units. Work that never sets it has no known end."""

    def advance(self, n: int, note: str = "") -> None:
        """Report that `n` more units are done; `note` describes the state in a few words."""


class Progress(Protocol):
    """A listener, which may show work and messages."""

    def work(
        self, what: str, unit: Unit, *, total: int | None = None, done: int = 0, every: int | None = None
    ) -> AbstractContextManager[Work]:
        """Begin work called `what`, which ends with the block.

        `done` of its `total` units are already done. A listener that writes lines writes one every `every`
        units, or as often as it likes if that is None.
        """

    def say(self, sentence: str) -> None:
        """Show a message."""

    def warn(self, sentence: str) -> None:
        """Show a warning."""


class Unheard:
    """The default listener: work is silent, and messages go to the logger `upcycle`."""

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


UNHEARD = Unheard()
_listener: ContextVar[Progress] = ContextVar("upcycle_progress", default=UNHEARD)


@contextmanager
def reporting_to(listener: Progress | None) -> Iterator[None]:
    """Report everything in the block to `listener`; None keeps the present listener."""
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
    """Begin work for the present listener; see `Progress.work`."""
    return _listener.get().work(what, unit, total=total, done=done, every=every)


def say(sentence: str) -> None:
    """Send a message to the present listener."""
    _listener.get().say(sentence)


def warn(sentence: str) -> None:
    """Send a warning to the present listener."""
    _listener.get().warn(sentence)
