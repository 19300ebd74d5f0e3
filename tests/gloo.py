"""Several gloo processes that run one function each and give back what it returned."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_MAIN = """
import pickle, sys
sys.path[:0] = {path!r}
import faulthandler, importlib, os
import torch.distributed as dist
faulthandler.dump_traceback_later({timeout}, exit=True)  # where a rank hangs
dist.init_process_group("gloo")
module, name = {function!r}.split(":")
with open({folder!r} + "/arguments", "rb") as file:
    arguments = pickle.load(file)
result = getattr(importlib.import_module(module), name)(*arguments)
with open({folder!r} + "/" + os.environ["RANK"], "wb") as file:
    pickle.dump(result, file)
"""


def run(world: int, function: str, *arguments: Any, timeout: float = 120) -> list[Any]:
    """`function` ("module:name", a module of this folder) on `world` processes; the result of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "arguments").write_bytes(pickle.dumps(arguments))
        path = [str(Path(__file__).parent)]
        code = _MAIN.format(path=path, function=function, folder=folder, timeout=timeout - 5)
        started = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", code],
                env=os.environ | environment(rank, world, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        said = []
        try:
            for process in started:
                said.append(process.communicate(timeout=timeout)[0])
        finally:
            for process in started:
                process.kill()
        for rank, process in enumerate(started):
            if process.returncode:
                raise AssertionError(f"rank {rank} of {world} failed:\n{said[rank][-4000:]}")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world)]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set, and one thread a process."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
