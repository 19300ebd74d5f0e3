"""Checkpoints of a run: model, optimizer and position, whole or not there, for any number of ranks.

`RUN/checkpoints/step-N/` holds what torch.distributed.checkpoint writes, and `state.json` written last, with
the SHA-256 of all that. It is made as `step-N.partial` and renamed when all of it is on disk.
"""

from __future__ import annotations

import hashlib
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

from upcycle.checkpoints.checkpoint import file_hash
from upcycle.errors import UpcycleError
from upcycle.training.parallel import Ranks
from upcycle.training.untrusted import Planner, Reader

# Names instead of positions: another topology makes other groups of parameters.
ADDED = ("identity", "micro_batch", "sha256", "state_sha256")  # of a state: what only its file has
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
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text())
        _refuse_damaged(state)
    except (OSError, ValueError, RecursionError) as error:
        raise UpcycleError(f"{path} cannot be read: {error}; delete that folder") from None
    return dict(state)


def _refuse_damaged(state: Any) -> None:
    """A `ValueError` where a state is not one that `save` wrote."""
    kinds = {"step": int, "batches": dict, "identity": dict}
    if not isinstance(state, dict):
        raise ValueError(f"it holds {type(state).__name__}, not a JSON object")
    if wrong := [key for key, kind in kinds.items() if type(state.get(key)) is not kind]:
        raise ValueError(f"{', '.join(wrong)} is missing in it, or damaged")
    numbers = ("loss", "held_out_loss", "held_out_start", "held_out_accuracy", "held_out_accuracy_start")
    if wrong := [key for key in numbers if type(state.get(key)) not in (int, float, type(None))]:
        raise ValueError(f"{', '.join(wrong)} is no number in it")
    rows = state.get("micro_batch")
    if state["step"] < 0 or (rows is not None and (type(rows) is not int or rows < 1)):
        raise ValueError("its step, or its micro_batch, is no count")
    hashes = state.get("sha256", {})
    if not isinstance(hashes, dict) or state.get("state_sha256", _hash_of(state)) != _hash_of(state):
        raise ValueError("it is not as it was written")


def _hash_of(state: dict[str, Any]) -> str:
    """The SHA-256 of a state, but for the place where it stands."""
    told = {key: value for key, value in state.items() if key != "state_sha256"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def save(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ranks: Ranks,
    keep: int,
) -> str | None:
    """Write checkpoint `state["step"]`; the reason where it could not be, and then nothing has changed.

    Every rank calls it, with an optimizer that has a state for every parameter (`optimizer.fill`). Older
    checkpoints beyond `keep` go when the new one is in place.
    """
    final = folder_of(out) / f"step-{state['step']}"
    partial = final.with_name(final.name + ".partial")
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
    ranks.barrier()
    reason = None
    hashes: dict[str, str] = {}
    try:
        partial.mkdir(parents=True, exist_ok=True)
        tensors = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=_BY_NAME),
        }
        with _alone():
            dcp.save(_contiguous(tensors), storage_writer=dcp.FileSystemWriter(partial, sync_files=True))
        hashes = _hashes(partial, ranks)
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        if _interrupted(error):
            shutil.rmtree(partial, ignore_errors=True)
            raise KeyboardInterrupt from None
        reason = _root(error)
    told = ranks.gathered((reason, hashes))
    reason = next((why for why, _ in told if why is not None), None)
    if ranks.first and reason is None:
        whole = {**state, "sha256": {name: digest for _, part in told for name, digest in part.items()}}
        try:
            text = json.dumps(whole | {"state_sha256": _hash_of(whole)}, indent=1)
            write_text(partial / "state.json", text)
        except OSError as error:
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


def _hashes(partial: Path, ranks: Ranks) -> dict[str, str]:
    """The SHA-256 of the files that this rank wrote, read while the system still has them in memory."""
    mine = [*partial.glob(f"__{ranks.rank}_*"), *([partial / ".metadata"] if ranks.first else [])]
    return {path.name: file_hash(path) for path in mine}


def refuse_changed(checkpoint: Path, ranks: Ranks) -> None:
    """Refuse a checkpoint whose files are not as they were saved; each rank looks at some of them.

    Checkpoints of versions that wrote no hashes are taken as they are.
    """
    known = sorted(read_state(checkpoint).get("sha256", {}).items())
    changed = None
    for name, digest in known[ranks.rank :: ranks.world]:
        path = checkpoint / Path(name).name
        try:
            if file_hash(path) != digest:
                changed = f"{path.name} is not as it was saved (its SHA-256 differs)"
        except OSError as error:
            changed = f"{path.name}: {error.strerror}"
    if (said := next(filter(None, ranks.gathered(changed)), None)) is not None:
        raise UpcycleError(
            f"{checkpoint} cannot be read: {said}; delete that folder to go on from an older one"
        )


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Fill model and optimizer from a checkpoint, each rank its own part, whatever the topology was."""
    live: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        live["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_BY_NAME)
    read = _contiguous(live)
    try:
        with _alone():
            dcp.load(read, storage_reader=Reader(checkpoint), planner=Planner())
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        if _interrupted(error):
            raise KeyboardInterrupt from None
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


def _failures(error: BaseException) -> list[BaseException]:
    """What went wrong on each rank, without the wrapping that DCP puts around it."""
    wrapped = getattr(error, "failures", None) or {}
    found = [each[0] if isinstance(each, tuple) else each for each in wrapped.values()] or [error]
    return [_first_cause(each) for each in found]


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _interrupted(error: BaseException) -> bool:
    """Whether a person asked for the end: DCP takes that for a failure of its own."""
    return any(isinstance(each, KeyboardInterrupt) for each in _failures(error))


def _root(error: BaseException) -> str:
    """The first line of what went wrong."""
    error = _failures(error)[0]
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
