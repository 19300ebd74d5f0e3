"""`upcycle` in processes of their own that need not import torch again: forks of a server that has.

As a script, the server: a JSON line in is a command line or a function to start, or a process to ask after.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any


class Server:
    """Starts command lines, and knows how they ended."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def start(
        self,
        arguments: list[str],
        said: Path,
        *,
        errors: Path | None = None,
        opened: Path | None = None,
        more: Mapping[str, str] | None = None,
        before: str = "",
    ) -> int:
        """The process of `upcycle ARGUMENTS` with `more` in its environment; it prints to the file `said`.

        What it prints as errors goes to `errors`, if that is given. What it opens goes to `opened`: a JSON
        list of a path and whether it is written to, line by line. `before` ("module:name", a module of this
        folder) is called first.
        """
        told = {"said": str(said), "errors": errors and str(errors), "opened": opened and str(opened)}
        return int(self._ask({"start": arguments, "more": dict(more or {}), "before": before, **told}))

    def run(self, arguments: list[str], folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """`upcycle ARGUMENTS` when it has ended. What it prints goes through files of `folder`."""
        said, errors = folder / "said", folder / "errors"
        code = self.wait(self.start(arguments, said, errors=errors, **options))
        assert code is not None
        return subprocess.CompletedProcess(arguments, code, said.read_text(), errors.read_text())

    def call(self, function: str, folder: Path, name: str, more: Mapping[str, str], seconds: float) -> int:
        """The process of `function` ("module:name", a module of this folder) with `more` in its environment.

        Its arguments are in the file `arguments` of `folder`, pickled. What it returns goes to the file
        `name`, pickled as well, and what it prints to `name`.said. After `seconds` it says where it hangs,
        and ends.
        """
        told = {
            "folder": str(folder),
            "name": name,
            "environment": dict(os.environ | more),
            "at": os.getcwd(),
        }
        return int(self._ask({"call": function, "seconds": seconds, **told}))

    def ended(self, process: int) -> int | None:
        """How a process ended: its exit code, or minus the signal; None while it runs."""
        code: int | None = self._ask({"ended": process})
        return code

    def wait(
        self, process: int, until: Callable[[], bool] = lambda: False, seconds: float = 100
    ) -> int | None:
        """Wait for the end of a process, or before it for `until`."""
        end = time.monotonic() + seconds
        while (code := self.ended(process)) is None and not until():
            assert time.monotonic() < end, "it takes too long"
            time.sleep(0.01)
        return code

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@cache
def shared() -> Server:
    """The server of this session, which ends with it.

    It is no fork of the tests: four ranks that are forks of a worker of xdist wait for each other for ever.
    """
    return Server()


def warm() -> None:
    """Import what a fork should find imported, and build what transformers builds once a process."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import upcycle.calibration.calibration
    import upcycle.cli.program
    import upcycle.evaluation.comparison
    import upcycle.evaluation.scores
    import upcycle.training.export  # noqa: F401
    from upcycle import families, init
    from upcycle.training import optimizers, schedules

    get_checkpoint_conversion_mapping("mixtral")
    families.find("llama")
    init.find("drop")
    for room in (optimizers, schedules):
        for name in room.names():
            room.find(name)


def serve() -> None:
    warm()
    ended: dict[int, int] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            answer: int | None = os.fork()
            if not answer:
                _become(**question)
        elif "call" in question:
            module, name = question.pop("call").split(":")
            function = getattr(importlib.import_module(module), name)  # once, and here
            answer = os.fork()
            if not answer:
                _compute(function, **question)
        else:
            process = question["ended"]
            found, status = (0, 0) if process in ended else os.waitpid(process, os.WNOHANG)
            if found:
                ended[process] = os.waitstatus_to_exitcode(status)
            answer = ended.get(process)
        print(json.dumps(answer), flush=True)


def _watch(path: str) -> None:
    """Note every file, and no folder, that this process opens from now on."""
    notes = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            mode, flags = str(arguments[1] or ""), int(arguments[2] or 0)
            writes = bool(set("wax+") & set(mode)) or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            where = os.path.join(os.getcwd(), os.fsdecode(arguments[0]))
            if not os.path.isdir(where):
                os.write(notes, (json.dumps([where, writes]) + "\n").encode())

    sys.addaudithook(note)


def _compute(
    function: Callable[..., Any],
    folder: str,
    name: str,
    environment: dict[str, str],
    at: str,
    seconds: float,
) -> None:
    """Call a function in this fork and end it."""
    _detach(Path(folder) / f"{name}.said")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(at)
    code = 1
    try:
        faulthandler.dump_traceback_later(seconds, exit=True)
        result = function(*pickle.loads((Path(folder) / "arguments").read_bytes()))
        (Path(folder) / name).write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _detach(said: Path | str, errors: str | None = None) -> None:
    """Leave the streams and the signals of the server."""
    for stream, path in ((1, said), (2, errors or said)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.ftruncate(handle, 0)
        os.dup2(handle, stream)
    os.close(0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background


def _become(
    start: list[str],
    said: str,
    errors: str | None,
    opened: str | None,
    more: dict[str, str],
    before: str,
) -> None:
    """Run the command line in this fork and end it."""
    from upcycle import cli

    _detach(said, errors)
    os.environ.update(more)
    code: Any = 1
    try:
        if before:
            module, name = before.split(":")
            getattr(importlib.import_module(module), name)()
        if opened:
            _watch(opened)
        cli.main(start)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # as Python does at the end of a process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
