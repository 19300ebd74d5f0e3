"""The command line: `upcycle plan | advise | convert | verify | calibrate | train | ...`.

Results go to standard output, progress and errors to standard error. Exit code 0: done; 1: verify found
that a promise does not hold; 2: a mistake in what was given; 3: a fault of upcycle itself; 130: interrupted;
141: whoever read the output went away. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
from contextlib import suppress
from functools import singledispatch
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError, cut, printable

MISTAKE, FAULT, INTERRUPTED, NOBODY_READS = 2, 3, 130, 141
GO_ON = "interrupted; convert and train go on with --resume, calibrate as it was started"


class _Interrupts:
    """Whether Ctrl-C came: some libraries turn what it raises into an error of theirs."""

    came = False

    def note(self, number: int, frame: Any) -> None:
        self.came = True
        raise KeyboardInterrupt


def main(args: list[str] | None = None) -> None:
    """The console script."""
    interrupts = _Interrupts()
    with suppress(ValueError):  # not the main thread: no signals there
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupts.note)
    try:
        _open_streams()
        from upcycle.cli.program import run

        run(args)
        sys.stdout.flush()
    except SystemExit:
        _flush()
        raise
    except BaseException as error:
        code, said = (INTERRUPTED, GO_ON) if interrupts.came else _outcome(error)
        _say(said)
        if code == FAULT and os.environ.get("UPCYCLE_TRACEBACK"):
            traceback.print_exc()
        _drop_what_is_unwritten()
        sys.exit(code)
    finally:
        with suppress(ValueError):
            if signal.getsignal(signal.SIGINT) == interrupts.note:
                signal.signal(signal.SIGINT, signal.default_int_handler)


@singledispatch
def _outcome(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and what is said about it. Of a kind that is not below, it is our fault."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of an accelerator
        return _outcome(MemoryError())
    where = traceback.extract_tb(error.__traceback__)[-1]
    return FAULT, (
        f"internal error: {type(error).__name__}: {cut(str(error), 300)} ({Path(where.filename).name}, line "
        f"{where.lineno}). This is a fault of upcycle, please report it; UPCYCLE_TRACEBACK=1 shows more"
    )


@_outcome.register
def _(error: UpcycleError) -> tuple[int, str]:
    return MISTAKE, f"error: {error}"


@_outcome.register
def _(error: KeyboardInterrupt) -> tuple[int, str]:
    return INTERRUPTED, GO_ON


@_outcome.register
def _(error: ModuleNotFoundError) -> tuple[int, str]:
    from upcycle.system.needed import missing

    sentence = missing(error)
    return _outcome.dispatch(BaseException)(error) if sentence is None else _outcome(sentence)


@_outcome.register
def _(error: BrokenPipeError) -> tuple[int, str]:
    return NOBODY_READS, ""


@_outcome.register
def _(error: ValueError) -> tuple[int, str]:
    if "embedded null" in str(error):  # what Python says where a path holds one
        return MISTAKE, "error: a path holds a NUL character, and no path can; give another one"
    return _outcome.dispatch(BaseException)(error)


@_outcome.register
def _(error: MemoryError) -> tuple[int, str]:
    return MISTAKE, "error: the memory does not reach; give less at a time, or use a machine that has more"


@_outcome.register
def _(error: OSError) -> tuple[int, str]:
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    named = " to ".join(names) or _file_in_use(error) or "input or output"
    room = "; make room, and start again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return MISTAKE, f"error: {named}: {error.strerror or error}{room}"


def _file_in_use(error: BaseException) -> str | None:
    """The file that was open where an error came from; the system names none where a write fails."""
    for frame, _ in [*traceback.walk_tb(error.__traceback__)][::-1]:
        for value in frame.f_locals.values():
            if isinstance(value, io.IOBase) and isinstance(name := getattr(value, "name", None), (str, Path)):
                return str(name)
    return None


def _open_streams() -> None:
    """Standard output and error that take any text: closed ones swallow it, and what an encoding lacks is
    written as Python escapes it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, for as long as the process lives
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _say(said: str) -> None:
    """A line on standard error, if anybody takes it."""
    with suppress(OSError, ValueError):
        if said:
            print(f"upcycle: {printable(said)}", file=sys.stderr)


def _flush() -> None:
    """Write what a command that chose its own exit code has left; that code is the last word."""
    try:
        sys.stdout.flush()
    except OSError as error:
        code, said = _outcome(error)
        _say(said)
        _drop_what_is_unwritten()
        sys.exit(code)


def _drop_what_is_unwritten() -> None:
    """Let Python end without another complaint about an output that nobody takes."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
