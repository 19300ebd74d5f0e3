"""A rank of a world that is not there: one process that builds its part of a model, without data.

torch's fake process group answers every collective at once and moves nothing, and its fake tensors have
shapes and no data. So a process can be any rank of any world at any size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from upcycle.checkpoints.dtypes import FLOATS
from upcycle.checkpoints.header import TensorInfo
from upcycle.hf import meshes
from upcycle.loading import attention_heads
from upcycle.tensors.entries import Entry
from upcycle.tensors.lazy import Index, Lazy
from upcycle.training import parallel
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run
from upcycle.training.start import Start


@contextmanager
def as_rank(run: Run, begun: Start, rank: int, world: int, precision: str) -> Iterator[Ranks]:
    """Be one rank of a world that is not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    given = {name: str(value) for name, value in names.items()}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    before = {name: os.environ.get(name) for name in given}
    experts = begun.built.expert_counts if begun.built else set()
    os.environ.update(given)
    try:
        if world > 1:
            dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        with parallel.ranks(
            run.parallel,
            experts=experts,
            heads=attention_heads(begun.config),
        ) as here:
            if begun.teacher is not None and world > 1:  # it has no experts, and meshes of its own
                meshes.meshes(replace(here.layout, ep=1))
            yield here.computing_in(precision)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def without_data() -> Iterator[None]:
    """Let tensors have no data, except in device meshes: torch looks for its own rank in them."""
    real = DeviceMesh.__init__

    def init(self: DeviceMesh, *args: Any, **options: Any) -> None:
        with unset_fake_temporarily():
            real(self, *args, **options)

    try:
        DeviceMesh.__init__ = init  # type: ignore[method-assign]
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        DeviceMesh.__init__ = real  # type: ignore[method-assign]


def blank(tensors: Mapping[str, Lazy], asked: Asked) -> dict[str, Entry]:
    """Return zeros in the place of tensors, which note how many bytes are asked of them."""
    return {name: Entry(_Blank(tensor, asked), "F64") for name, tensor in tensors.items()}


@dataclass
class Asked:
    """How many bytes have been asked of blank tensors."""

    nbytes: int = 0


@dataclass(frozen=True, eq=False)
class _Blank(Lazy):
    """Zeros in the shape of another tensor, which note how much is asked of it."""

    like: Lazy
    asked: Asked

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
