"""Signals that ask a long piece of work to stop at a good place."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def noted(*numbers: signal.Signals, twice_stops: bool = False) -> Iterator[list[int]]:
    """A list that is no longer empty once one of the signals came. With `twice_stops` a second one raises
    KeyboardInterrupt. Where this is not the main thread nobody sends us signals, and it stays empty.
    """
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came and twice_stops:
            raise KeyboardInterrupt
        came.append(number)

    before = {}
    try:
        for number in numbers:
            if signal.getsignal(number) is signal.SIG_IGN:  # whoever started us wants it so
                continue
            before[number] = signal.signal(number, note)
    except ValueError:
        yield came
        return
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held(number: signal.Signals = signal.SIGINT) -> Iterator[None]:
    """Let a piece of work that should be whole come to its end: a signal that comes meanwhile raises
    KeyboardInterrupt after it, a second one at once."""
    with noted(number, twice_stops=True) as came:
        yield
    if came:
        raise KeyboardInterrupt
