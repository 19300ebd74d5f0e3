"""Several gloo processes that run one function each and give back what it returned."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

_MAIN = """
import faulthandler, importlib, os, pickle, sys, traceback
sys.path[:0] = {path!r}
import torch.distributed as dist
module, name = {function!r}.split(":")
function = getattr(importlib.import_module(module), name)  # once: the ranks are forks of this process
with open({folder!r} + "/arguments", "rb") as file:
    environments, arguments = pickle.load(file)

def rank(environment):
    said = os.open({folder!r} + "/said" + environment["RANK"], os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 1), os.dup2(said, 2)
    os.environ.update(environment)
    faulthandler.enable(sys.stderr)
    faulthandler.dump_traceback_later({timeout}, exit=True)  # where a rank hangs
    dist.init_process_group("gloo")
    result = function(*arguments)
    with open({folder!r} + "/" + environment["RANK"], "wb") as file:
        pickle.dump(result, file)

started = []
for environment in environments:
    if (child := os.fork()) == 0:
        try:
            rank(environment)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    started.append(child)
codes = dict(os.wait() for _ in started)
sys.exit(any(codes.values()))
"""


def run(world: int, function: str, *arguments: Any, timeout: float = 300) -> list[Any]:
    """`function` ("module:name", a module of this folder) on `world` processes; the result of each rank.

    One process imports what is needed, and the ranks are its forks: importing takes longer than most tests.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        environments = [environment(rank, world, port) for rank in range(world)]
        (Path(folder) / "arguments").write_bytes(pickle.dumps((environments, arguments)))
        path = [str(Path(__file__).parent)]
        code = _MAIN.format(path=path, function=function, folder=folder, timeout=timeout - 5)
        started = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            env=os.environ | environment(0, 1, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that the ranks can be ended with it
        )
        try:
            said = started.communicate(timeout=timeout)[0]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
        if started.returncode:
            for rank in range(world):
                if not (Path(folder) / str(rank)).exists():
                    log = Path(folder) / f"said{rank}"
                    said += f"\nrank {rank}:\n{log.read_text()[-4000:] if log.exists() else ''}"
            raise AssertionError(f"{world} ranks failed:\n{said[-12000:]}")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world)]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set, and one thread a process."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
