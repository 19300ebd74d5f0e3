"""Several gloo processes that run one function each and give back what it returned."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import forked


def run(world: int, function: str, *arguments: Any, timeout: float = 300) -> list[Any]:
    """`function` ("module:name", a module of this folder) on `world` processes; the result of each rank.

    The ranks are forks of the session's server: importing takes longer than most tests.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = forked.shared()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "arguments").write_bytes(pickle.dumps((function, arguments)))
        ranks = [
            server.call("gloo:_rank", folder, str(rank), environment(rank, world, port), timeout - 5)
            for rank in range(world)
        ]
        try:
            codes = [server.wait(process, seconds=timeout) for process in ranks]
        finally:
            for process in ranks:
                if server.ended(process) is None:
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
        if any(codes):
            said = [
                f"rank {i}:\n{(folder / f'{i}.said').read_text()[-4000:]}" for i in range(world) if codes[i]
            ]
            raise AssertionError(f"{len(said)} of {world} ranks failed:\n" + "\n".join(said))
        return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(world)]


def _rank(function: str, arguments: tuple[Any, ...]) -> Any:
    """What one rank does."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)(*arguments)


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set, and one thread a process."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
