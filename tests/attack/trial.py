"""One damaged input given to one command, and what came of it.

A target is a function of bytes that runs a command in this process. It may take them, or refuse them with a
sentence; anything else is a crash: another exception, another exit code, memory that does not reach, or more
than `SECONDS` of work.
"""

from __future__ import annotations

import contextlib
import io
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mutations import Mutation

from upcycle import cli

SECONDS = 30  # of processor time that a case may take
_AT_ALL = 600  # seconds that it may take on a machine that has much else to do
_SHORTEN = 20  # seconds spent on making an input shorter


class TooSlowError(BaseException):
    """A case took longer than it may; nothing catches it on the way."""


@dataclass(frozen=True)
class Start:
    """An input that is whole, and what reads it."""

    data: bytes
    run: Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """A kind of file, and its share of the cases."""

    name: str
    mutate: Mutation
    starts: Sequence[Start]
    cases: int = 1000  # its weight in a campaign

    def case(self, number: int) -> tuple[Start, bytes]:
        """The damaged input of a number, and what reads it; always the same."""
        draw = random.Random(f"{self.name} {number}")
        start = self.starts[number % len(self.starts)]
        return start, self.mutate(draw, start.data)


@dataclass(frozen=True)
class Crash:
    """What a target did instead of refusing an input."""

    target: str
    number: int
    kind: str  # the exception, and the place it came from
    data: bytes
    said: str

    def __str__(self) -> str:
        shown = self.data if len(self.data) <= 2000 else self.data[:2000] + b"..."
        return f"{self.target}, case {self.number}: {self.kind}\n  shortest input: {shown!r}\n{self.said}"


@dataclass
class Counts:
    """What came of the cases of a target."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: list[Crash] = field(default_factory=list)


def attack(target: Target, numbers: Sequence[int], seconds: float | None = None) -> Counts:
    """Run the cases of these numbers, or as many as there is time for; a crash of each kind once."""
    counts, seen = Counts(), set()
    end = None if seconds is None else time.monotonic() + seconds
    for number in numbers:
        if end is not None and time.monotonic() > end:
            break
        start, data = target.case(number)
        counts.cases += 1
        accepted, error = judged(start.run, data)
        if error is None:
            counts.accepted += accepted
            counts.refused += not accepted
            continue
        kind = _kind(error)
        if kind in seen:
            data, said = b"(of a kind that was seen)", ""
        else:
            seen.add(kind)
            said = "".join(traceback.format_exception(error, limit=-12))
            data = shortest(start.run, data, kind)
        counts.crashes.append(Crash(target.name, number, kind, data, said))
    return counts


def judged(run: Callable[[bytes], object], data: bytes) -> tuple[bool, BaseException | None]:
    """Whether the input was taken, and what came where it was neither taken nor refused."""
    try:
        with _silence(), _limit():
            run(data)
    except SystemExit as end:
        if end.code in (None, 0, 1, 2):
            return end.code != 2, None
        return False, end.__context__ if isinstance(end.__context__, BaseException) else end
    except KeyboardInterrupt:
        raise
    except MemoryError as error:
        return False, error
    except BaseException as error:
        refused = cli._outcome(error)[0] == cli.MISTAKE
        return False, None if refused else error
    return True, None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Swallow what is printed, as UTF-8."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    def late(number: int, frame: Any) -> None:
        raise TooSlowError(f"more than {SECONDS} s of work, or {_AT_ALL} s at all")

    timers = {signal.ITIMER_PROF: (signal.SIGPROF, SECONDS), signal.ITIMER_REAL: (signal.SIGALRM, _AT_ALL)}
    before = {number: signal.signal(number, late) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, (number, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def _kind(error: BaseException) -> str:
    """The exception and the last place in our own code that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "upcycle" in Path(f.filename).parts] or frames
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__} at {where}"


def shortest(run: Callable[[bytes], object], data: bytes, kind: str) -> bytes:
    """The shortest input found that ends in the same crash."""
    end = time.monotonic() + _SHORTEN
    size = len(data) // 2
    while size:
        at = 0
        while at < len(data):
            if time.monotonic() > end:
                return data
            less = data[:at] + data[at + size :]
            _, error = judged(run, less)
            if error is not None and _kind(error) == kind:
                data = less
            else:
                at += size
        size //= 2
    return data
