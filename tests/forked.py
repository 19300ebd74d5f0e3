"""`upcycle` in a process of its own that need not import torch again: forked from one that did."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

import upcycle.training.export
import upcycle.training.loop  # noqa: F401  what a fork should find imported

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["forked"])


def start(arguments: list[str], said: Path) -> ForkServerProcess:
    """The command line with `arguments`; what it prints goes to the file `said`."""
    process = _CONTEXT.Process(target=_main, args=(arguments, str(said)))
    process.start()
    return process


def _main(arguments: list[str], said: str) -> None:
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    from upcycle import cli

    try:
        cli.main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
