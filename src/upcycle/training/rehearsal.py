"""`upcycle train --dry-run`: the layout of a run in a world of any size, built on one process without a GPU.

torch's fake process group answers every collective at once and moves nothing. So this process can be any
rank of any world, and holds what that rank would hold. Nothing is written, and of the source only headers are
read.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from upcycle import tasks
from upcycle.checkpoints.checkpoint import TensorInfo
from upcycle.checkpoints.dtypes import FLOATS
from upcycle.errors import UpcycleError
from upcycle.tensors.lazy import Index, Lazy
from upcycle.training import fit, gradients, micro_batch, optimizer, start
from upcycle.training.parallel import Ranks, ranks
from upcycle.training.routing import Routers
from upcycle.training.run import Run
from upcycle.training.start import Start

_MOST = 8  # ranks that are built, spread evenly over a larger world
_UPDATES = 2


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one rank holds, in bytes, after two updates of its weights."""

    rank: int
    weights: int
    gradients: int
    moments: int
    reads: int  # of its tensors, in the type that they are stored in
    over_even_share: float  # weights, in even shares of the whole model

    @property
    def total(self) -> int:
        """The bytes of weights, gradients and moments."""
        return self.weights + self.gradients + self.moments


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a run would be in a world of `world` processes."""

    world: int
    layout: Mapping[str, int]
    precision: str
    parameters: int
    active_parameters: int
    steps: int
    rows: int  # of the global batch
    tokens_per_step: int
    rows_per_rank: int
    micro_batch: int | None  # rows of a forward pass; None: as many as fit when the run begins
    activations_per_row: int  # bytes, estimated
    warnings: tuple[str, ...]
    ranks: tuple[Held, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the rehearsal as JSON."""
        return asdict(self)


def rehearse(run: Run, world: int = 1) -> Rehearsal:
    """Build the layout of `run` in a world of so many processes, and update the weights of some ranks twice.

    The weights are zeros, so memory is needed for one rank's part at a time. Raises `UpcycleError` for what a
    run would refuse before its first step.
    """
    if world < 1:
        raise UpcycleError(f"world = {world}; it must be 1 or more")
    if "RANK" in os.environ:
        raise UpcycleError("a dry run is one process; start it without torchrun and give --world")
    begun = start.start_of(run)
    task = tasks.fitting(run.task, begun.dense.architecture)
    fit.refuse_pooling(run, begun.built)
    if (long := task.beyond_positions(run.train.sequence_length, begun.subject)) is not None:
        raise UpcycleError(long)
    precision = fit.precision(run)
    lengths = task.lengths(run.train.sequence_length, begun.subject)
    chosen = sorted({place * (world - 1) // (_MOST - 1) for place in range(_MOST)})
    groups, held = _in_turn(run, chosen, world)
    fit.refuse_uneven_rows(run, groups)
    fit.refuse_broken_groups(run, begun.built, lengths, groups)
    share = run.train.rows // groups
    return Rehearsal(
        world=world,
        layout={"data": groups, "tp": run.parallel.tp, "ep": run.parallel.ep},
        precision=precision,
        parameters=begun.parameters,
        active_parameters=begun.active_parameters,
        steps=run.train.total_steps,
        rows=run.train.rows,
        tokens_per_step=run.train.rows * sum(lengths.values()),
        rows_per_rank=share,
        micro_batch=None if run.train.micro_batch is None else min(run.train.micro_batch, share),
        activations_per_row=micro_batch.bytes_of_row(run, begun, lengths, precision),
        warnings=tuple(fit.warnings(run, begun.built)),
        ranks=tuple(held),
    )


def _in_turn(run: Run, chosen: Sequence[int], world: int) -> tuple[int, list[Held]]:
    """Return the number of groups with different rows, and what the chosen ranks hold.

    Each rank is a process of its own, one after another, because libraries remember the meshes of a process.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    with processes.Pool(1, maxtasksperchild=1) as pool:
        found = [pool.apply(_as_rank, (run.as_table(), rank, world)) for rank in chosen]
    return found[0][0], [held for _, held in found]


def _as_rank(table: dict[str, Any], rank: int, world: int) -> tuple[int, Held]:
    """Be one rank of a world that is not there, until this process ends."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    run = Run.of(table)
    begun = start.start_of(run)
    precision = fit.precision(run)
    experts = begun.built.expert_counts if begun.built else set()
    if world > 1:
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    with ranks(run.parallel, mixed=precision == "mixed", experts=experts) as here:
        return here.dp_size, _held(run, begun, here, precision)


def _held(run: Run, begun: Start, here: Ranks, precision: str) -> Held:
    """Build a rank's part of the model from zeros, update it, and return what it holds."""
    asked = _Asked()
    blank = {name: replace(e, lazy=_Blank(e.lazy, asked)) for name, e in begun.entries.items()}
    model = start.model_of(replace(begun, entries=blank), run, here, precision)
    scales = start.scales(begun, run, model, Routers.of(model))
    updater = optimizer.make(model, run.optimizer, scales)
    for _ in range(_UPDATES):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.set_rate(updater, run.schedule.at(0, run.train.total_steps))
        updater.step()
    parameters = list(model.parameters())
    weights = sum(gradients.local(p).nbytes for p in parameters)
    states = [t for p in parameters for t in updater.state[p].values() if isinstance(t, torch.Tensor)]
    return Held(
        rank=here.rank,
        weights=weights,
        gradients=sum(gradients.local(p.grad).nbytes for p in parameters if p.grad is not None),
        moments=sum(gradients.local(t).nbytes for t in states),
        reads=asked.nbytes,
        over_even_share=weights * here.world / sum(p.nbytes for p in parameters),
    )


@dataclass
class _Asked:
    nbytes: int = field(default=0)


@dataclass(frozen=True, eq=False)
class _Blank(Lazy):
    """Zeros in the shape of another tensor, which note how much is asked of it."""

    like: Lazy
    asked: _Asked

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.like.shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        return self.like.dtype

    def read(self, index: Index, dtype: str) -> np.ndarray:
        out = np.zeros(tuple(b - a for a, b in index), FLOATS[dtype])
        self.asked.nbytes += out.size * FLOATS[self.dtype].itemsize
        return out

    def describe(self) -> Any:
        return ["blank", self.like.describe()]

    def sources(self) -> Iterator[TensorInfo]:
        return self.like.sources()
