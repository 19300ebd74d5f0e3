"""Checkpoints of a run: model, optimizer and position, whole or not there, for any number of ranks.

`RUN/checkpoints/step-N/` holds what torch.distributed.checkpoint writes, and `state.json` written last. It is
made as `step-N.partial` and renamed when all of it is on disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_map

from upcycle.errors import UpcycleError
from upcycle.training.optimizer import fill
from upcycle.training.parallel import Ranks

# Names instead of positions: another topology makes other groups of parameters.
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def folder_of(out: Path) -> Path:
    """Where the checkpoints of a run are."""
    return out / "checkpoints"


def found(out: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints of a run, the oldest first."""
    names = [(re.fullmatch(r"step-(\d+)", p.name), p) for p in folder_of(out).glob("step-*")]
    return sorted((int(m.group(1)), p) for m, p in names if m and (p / "state.json").is_file())


def latest(out: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return checkpoints[-1][1] if (checkpoints := found(out)) else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself beside its tensors."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UpcycleError(f"{checkpoint}/state.json cannot be read: {error}; delete that folder") from None
    return state


def save(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ranks: Ranks,
    keep: int,
) -> str | None:
    """Write checkpoint `state["step"]`; the reason where it could not be, and then nothing has changed.

    Every rank calls it. Older checkpoints beyond `keep` go when the new one is in place.
    """
    final = folder_of(out) / f"step-{state['step']}"
    partial = final.with_name(final.name + ".partial")
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
    ranks.barrier()
    reason = None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        fill(optimizer)
        tensors = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=_BY_NAME),
        }
        with _alone():
            dcp.save(_contiguous(tensors), storage_writer=dcp.FileSystemWriter(partial, sync_files=True))
        if ranks.first:
            write_text(partial / "state.json", json.dumps(state, indent=1))
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        reason = _root(error)
    if ranks.any(reason is not None):
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        return reason or "another process could not write its part"
    if ranks.first:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(final.parent)
        for _, old in found(out)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    ranks.barrier()
    return None


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Fill model and optimizer from a checkpoint, each rank its own part, whatever the topology was."""
    live: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        live["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_BY_NAME)
    read = _contiguous(live)
    try:
        with _alone():
            dcp.load(read, storage_reader=dcp.FileSystemReader(checkpoint))
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        raise UpcycleError(
            f"{checkpoint} cannot be read: {_root(error)}; delete that folder to go on from an older one"
        ) from None
    back = tree_map(_as, read, live)
    set_model_state_dict(model, back["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, back["optimizer"], options=_BY_NAME)


def discard_partial(out: Path) -> None:
    """Remove what a killed run was writing."""
    for path in folder_of(out).glob("step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _alone() -> Iterator[None]:
    """Keep DCP from remarking that one process is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _contiguous(state: Any) -> Any:
    """DCP describes a shard as one rectangle, which a strided shard (packed gate and up under TP) is not."""

    def plain(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        placements = tuple(Shard(p.dim) if hasattr(p, "dim") else p for p in value.placements)
        return value if placements == value.placements else value.redistribute(placements=placements)

    return tree_map(plain, state)


def _as(value: Any, like: Any) -> Any:
    return value.redistribute(placements=like.placements) if isinstance(value, DTensor) else value


def _root(error: BaseException) -> str:
    """The first line of what went wrong, without the wrapping that DCP puts around it."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_text(path: Path, text: str) -> None:
    """Write a small file that is on disk when this returns."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make a rename in `folder` last through a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
