"""Listeners to progress that tests pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from upcycle.system.progress import Unheard, Unit, Work


class Counted(Unheard):
    """Calls a function with each advance of one kind of work, and first with what is done already."""

    def __init__(self, what: str, count: Callable[[int], None]) -> None:
        self.what, self.count = what, count

    @contextmanager
    def work(
        self, what: str, unit: Unit, *, total: int | None = None, done: int = 0, every: int | None = None
    ) -> Iterator[Work]:
        mine = what.startswith(self.what)
        if mine and done:
            self.count(done)
        yield _Counting(self.count if mine else lambda _: None)


class _Counting:
    def __init__(self, count: Callable[[int], None]) -> None:
        self.count = count

    def total(self, n: int) -> None:
        pass

    def advance(self, n: int, note: str = "") -> None:
        self.count(n)
