"""Handlers for signals that ask long work to stop at a safe point."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def noted(*numbers: signal.Signals, twice_stops: bool = False) -> Iterator[list[int]]:
    """Yield a list that receives the signals that arrive.

    With `twice_stops`, a second signal raises KeyboardInterrupt. Outside the main thread Python delivers no
    signals, and the list stays empty.
    """
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came and twice_stops:
            raise KeyboardInterrupt
        came.append(number)

    before = {}
    try:
        for number in numbers:
            if signal.getsignal(number) is signal.SIG_IGN:  # the parent process wants it ignored
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
    """Let the block finish before a signal takes effect.

    A signal during the block raises KeyboardInterrupt after it; a second one raises it at once.
    """
    with noted(number, twice_stops=True) as came:
        yield
    if came:
        raise KeyboardInterrupt


@contextmanager
def interrupting(number: signal.Signals) -> Iterator[None]:
    """Let a signal in the block do what Ctrl-C does; `noted` inside the block takes it over."""

    def interrupt(_: int, frame: Any) -> None:
        if callable(by_keyboard := signal.getsignal(signal.SIGINT)):
            by_keyboard(signal.SIGINT, frame)
        raise KeyboardInterrupt

    try:
        before = signal.getsignal(number)
        if before is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    except ValueError:  # outside the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(number, before)
