"""Checkpoints of a run: model, optimizer and position, written atomically, for any number of ranks.

`RUN/checkpoints/step-N/` holds the files of torch.distributed.checkpoint and `state.json`, written last, with
the SHA-256 of the others. It is written as `step-N.partial` and renamed when all of it is on disk.
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
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
from upcycle.records.reader import DamagedError
from upcycle.records.state import RunState
from upcycle.system import whole_file
from upcycle.training.parallel import Ranks
from upcycle.training.untrusted import Planner, Reader

# The names of the files in a checkpoint, whole or half-written.
_FILES = re.compile(
    r"__\d+_\d+\.distcp|(__\d+)?\.metadata(\.tmp)?|state\.json(\.\d+-[0-9a-f]{8}\.partial)?", re.ASCII
)

# Use names instead of positions: another topology has other parameter groups.
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def folder_of(out: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return out / "checkpoints"


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """Return the complete checkpoints of a run with their steps, oldest first."""
    names = [(re.fullmatch(r"step-(\d+)", p.name), p) for p in folder_of(out).glob("step-*")]
    return sorted((int(m.group(1)), p) for m, p in names if m and (p / RunState.FILE).is_file())


def latest(out: Path) -> Path | None:
    """Return the newest complete checkpoint of a run; None if there is none."""
    return there[-1][1] if (there := checkpoints(out)) else None


def read_state(checkpoint: Path) -> RunState:
    """Read the state.json of a checkpoint. Raises `UpcycleError` if it is damaged."""
    try:
        return RunState.read(checkpoint)
    except DamagedError as error:
        why = error.why
    except OSError as error:
        why = str(error)
    raise UpcycleError(f"{checkpoint / RunState.FILE} cannot be read: {why}; delete that folder")


def save(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    ranks: Ranks,
    keep: int,
) -> str | None:
    """Write checkpoint `state.step`; if that fails, change nothing and return the reason.

    Every rank must call it, with an optimizer that has a state for every parameter (`optimizer.make`). Older
    checkpoints beyond `keep` are removed once the new one is in place.
    """
    with alone():
        tensors, reason = agreed(lambda: tensors_of(model, optimizer), ranks)
        return reason if tensors is None else write(out, tensors, state, ranks, keep)


def agreed(make: Callable[[], Any], ranks: Ranks) -> tuple[Any, str | None]:
    """Return what `make` returns; on every rank None and a reason if a rank has no memory for it."""
    made, reason = None, None
    try:
        made = make()
    except (MemoryError, RuntimeError) as error:  # torch says a lack of memory with RuntimeError
        reason = f"no memory for a copy: {_root(error)}"
    if ranks.any(reason is not None):
        return None, reason or "another process has no memory for a copy"
    return made, None


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the live tensors of a checkpoint, in shards that DCP can describe. Every rank must call it."""
    tensors = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_BY_NAME),
    }
    found: dict[str, Any] = _contiguous(tensors)
    return found


def write(
    out: Path,
    tensors: Mapping[str, Any],
    state: RunState,
    ranks: Ranks,
    keep: int,
    stop: threading.Event | None = None,
) -> str | None:
    """Write tensors as checkpoint `state.step`, as `save` does. Setting `stop` gives it up."""
    final = folder_of(out) / f"step-{state.step}"
    partial = final.with_name(final.name + ".partial")
    if (taken := ranks.share(_in_the_way(final, partial) if ranks.first else None)) is not None:
        return f"{taken} is in the way, and it was not left by upcycle; move it away"
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
    ranks.barrier()
    reason = None
    hashes: dict[str, str] = {}
    try:
        dcp.save(
            dict(tensors),
            storage_writer=dcp.FileSystemWriter(partial, sync_files=True),
            planner=_Stoppable(stop),
            process_group=ranks.group,
        )
        hashes = _hashes(partial, ranks, stop)
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        if _interrupted(error):
            shutil.rmtree(partial, ignore_errors=True)
            raise KeyboardInterrupt from None
        reason = _root(error)
    told = ranks.gathered((reason, hashes))
    reason = next((why for why, _ in told if why is not None), None)
    if ranks.first and reason is None:
        whole = replace(state, sha256={name: digest for _, part in told for name, digest in part.items()})
        try:
            whole_file.write_json(partial / RunState.FILE, whole.sealed().as_table())
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        except OSError as error:
            reason = _root(error)
    if ranks.any(reason is not None):
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        return reason or "another process could not write its part"
    if ranks.first:
        with suppress(OSError):  # some file systems sync no folder; the checkpoint is there
            whole_file.sync_folder(final.parent)
        for old in (path for _, path in checkpoints(out)[:-keep] if _is_ours(path)):
            _remove(old)
    ranks.barrier()
    return None


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; a kill meanwhile leaves a half of it under the name of a partial one."""
    partial = checkpoint.with_name(checkpoint.name + ".partial")
    if _in_the_way(partial) is None:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            checkpoint = checkpoint.rename(partial)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _in_the_way(*paths: Path) -> Path | None:
    """Return the first of `paths` that is there and is no checkpoint; None if there is no such path."""
    return next((path for path in paths if os.path.lexists(path) and not _is_ours(path)), None)


def _is_ours(folder: Path) -> bool:
    """Return whether a folder is a checkpoint, whole or not: any other may be somebody else's."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return is_whole(folder) or all(_FILES.fullmatch(path.name) for path in folder.iterdir())


def is_whole(checkpoint: Path) -> bool:
    """Return whether a folder is a checkpoint whose state can be read."""
    try:
        read_state(checkpoint)
    except UpcycleError:
        return False
    return True


class _Stoppable(dcp.DefaultSavePlanner):
    """The default plan, which gives up before the next tensor once `stop` is set.

    The optimizer's settings are stored with every parameter, so each of their few values is pickled once.
    """

    def __init__(self, stop: threading.Event | None) -> None:
        super().__init__()
        self._stop = stop
        self._pickled: dict[str, bytes] = {}  # by what Python writes for a value, of plain ones alone

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        _heed(self._stop)
        found: torch.Tensor | io.BytesIO = super().resolve_data(write_item)
        return found

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        if write_item.type != WriteItemType.BYTE_IO or not _is_plain(object):
            return super().transform_object(write_item, object)
        if (key := repr(object)) not in self._pickled:
            self._pickled[key] = super().transform_object(write_item, object).getvalue()
        return io.BytesIO(self._pickled[key])


def _is_plain(value: Any) -> bool:
    """Return whether a value is nothing, a number, a text, or a tuple of these; `repr` tells them apart."""
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _heed(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise InterruptedError("it was given up")


def _hashes(partial: Path, ranks: Ranks, stop: threading.Event | None) -> dict[str, str]:
    """Hash the files that this rank wrote, while the system still has them in memory (SHA-256)."""
    mine = [*partial.glob(f"__{ranks.rank}_*"), *([partial / ".metadata"] if ranks.first else [])]
    hashes = {path.name: file_hash(path, stop) for path in mine}
    _heed(stop)
    return hashes


def refuse_changed(checkpoint: Path, ranks: Ranks) -> None:
    """Refuse a checkpoint whose files have changed since they were saved; each rank checks some of them.

    Checkpoints of versions that wrote no hashes are accepted.
    """
    known = sorted((read_state(checkpoint).sha256 or {}).items())
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
    """Fill model and optimizer from a checkpoint of any topology; each rank reads its own part.

    Raises `UpcycleError` if the checkpoint cannot be read.
    """
    live: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        live["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_BY_NAME)
    read = _contiguous(live)
    try:
        with alone():
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
    """Remove the partial checkpoints of a killed run."""
    for path in folder_of(out).glob("step-*.partial"):
        if re.fullmatch(r"step-\d+\.partial", path.name) and _is_ours(path):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def alone() -> Iterator[None]:
    """Silence DCP's warning about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _contiguous(state: Any) -> Any:
    """Redistribute shards that are not one rectangle of their tensor, because DCP describes only such.

    Packed gate and up under TP are such shards. Experts under FSDP over expert parallelism are not, and a
    copy of them would be as large as all that is saved.
    """

    def plain(value: Any) -> Any:
        if not isinstance(value, DTensor) or _is_rectangle(value):
            return value
        placements = tuple(Shard(p.dim) if hasattr(p, "dim") else p for p in value.placements)
        return value.redistribute(placements=placements)

    return tree_map(plain, state)


def _is_rectangle(tensor: DTensor) -> bool:
    """Return whether the shard of a rank is one rectangle of the tensor.

    A strided shard is one if its stride only says that later axes of the mesh cut the same dimension first,
    and if all cuts are even.
    """
    placements, sizes = tensor.placements, tensor.device_mesh.shape
    cut: list[Any] = [getattr(placement, "dim", None) for placement in placements]
    for axis, placement in enumerate(placements):
        if (stride := getattr(placement, "split_factor", None)) is None:
            continue
        alike = [other for other, dim in enumerate(cut) if dim == cut[axis]]
        if stride != math.prod(sizes[other] for other in alike if other > axis):
            return False
        if tensor.shape[cut[axis]] % math.prod(sizes[other] for other in alike):
            return False
    return True


def _as(value: Any, like: Any) -> Any:
    return value.redistribute(placements=like.placements) if isinstance(value, DTensor) else value


def _failures(error: BaseException) -> list[BaseException]:
    """Return the error of each rank, without DCP's wrapping."""
    wrapped = getattr(error, "failures", None) or {}
    found = [each[0] if isinstance(each, tuple) else each for each in wrapped.values()] or [error]
    return [_first_cause(each) for each in found]


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _interrupted(error: BaseException) -> bool:
    """Return whether the user interrupted the run, which DCP reports as a failure of its own."""
    return any(isinstance(each, KeyboardInterrupt) for each in _failures(error))


def _root(error: BaseException) -> str:
    """Return the first line of the original error."""
    error = _failures(error)[0]
    return (str(error).splitlines() or [type(error).__name__])[0]
