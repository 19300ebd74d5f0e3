"""The command line: `upcycle plan | advise | convert | verify | calibrate | train | ...`.

Results go to standard output, progress and errors to standard error. Exit codes: 0: done; 1: verify found a
violation; 2: a mistake in the input; 3: a bug in upcycle; 130: interrupted; 141: the reader of the output is
gone. No heavy module is imported before a command runs.
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
    """A record of Ctrl-C, because some libraries turn KeyboardInterrupt into other errors."""

    came = False

    def note(self, number: int, frame: Any) -> None:
        self.came = True
        raise KeyboardInterrupt

    def refuse_to_be_lost(self) -> None:
        """Raise KeyboardInterrupt if one came: Python drops it in callbacks, some of which imports call."""
        if self.came:
            raise KeyboardInterrupt


def main(args: list[str] | None = None) -> None:
    """Run the console script."""
    interrupts = _Interrupts()
    with suppress(ValueError):  # outside the main thread there are no signals
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupts.note)
    try:
        _open_streams()
        from upcycle.cli.program import run

        try:
            run(args)
        finally:
            interrupts.refuse_to_be_lost()
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
    """Return the exit code and the message for an error; an unknown kind of error is a bug of ours."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's error on an accelerator
        return _outcome(MemoryError())
    where = traceback.extract_tb(error.__traceback__)[-1]
    return FAULT, (
        f"internal error: {type(error).__name__}: {cut(str(error), 300)} ({Path(where.filename).name}, line "
        f"{where.lineno}). This is a fault of upcycle, please report it; UPCYCLE_TRACEBACK=1 shows more"
    )


@_outcome.register
def _(error: UpcycleError) -> tuple[int, str]:
    return MISTAKE, "" if error.elsewhere else f"error: {error}"


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
    if "embedded null" in str(error):  # Python's error for a path that holds NUL
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
    """Return the file that was open where an error arose; the system does not name it if a write fails."""
    for frame, _ in [*traceback.walk_tb(error.__traceback__)][::-1]:
        for value in frame.f_locals.values():
            if isinstance(value, io.IOBase) and isinstance(name := getattr(value, "name", None), (str, Path)):
                return str(name)
    return None


def _open_streams() -> None:
    """Make standard output and error accept any text.

    A closed stream discards it, and characters that the encoding lacks are written as Python's escapes.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, for as long as the process lives
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _say(said: str) -> None:
    """Write a line to standard error, if it is open."""
    with suppress(OSError, ValueError):
        if said:
            print(f"upcycle: {printable(said)}", file=sys.stderr)


def _flush() -> None:
    """Write the remaining output of a command that chose its own exit code, which is kept."""
    try:
        sys.stdout.flush()
    except OSError as error:
        code, said = _outcome(error)
        _say(said)
        _drop_what_is_unwritten()
        sys.exit(code)


def _drop_what_is_unwritten() -> None:
    """Discard unwritten output, so that Python does not complain about it at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
