"""The ranks of a run: how they share batches and experts, and sums across them.

A run without torchrun is a world of one, in which every collective is the identity.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from upcycle.errors import UpcycleError, listed
from upcycle.hf import meshes
from upcycle.sharding.layout import Layout
from upcycle.training.sections import Parallel

_ENDED = "ended"  # the key of the first sentence with which a process ended the run
_RENDEZVOUS = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # variables by which processes find each other


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This rank's place in the world. Ranks with the same `dp_rank` see the same rows.

    There are `dp_size` groups of ranks, each with different rows.
    """

    rank: int = 0
    world: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    device: torch.device
    layout: Layout = field(default_factory=Layout)
    config: DistributedConfig | None = None
    dp_group: Any = None
    group: Any = None  # the group of all ranks, if it is not torch's own

    @property
    def first(self) -> bool:
        """Return whether this rank prints and writes for all."""
        return self.rank == 0

    def computing_in(self, precision: str) -> Ranks:
        """Return the same ranks, whose models compute in this precision if they are sharded."""
        if self.config is None:
            return self
        mixed = precision == "mixed" and self.dp_size > 1
        return replace(self, config=replace(self.config, fsdp_mixed_precision=mixed))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` in place over the ranks that see different rows."""
        if self.dp_size > 1:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def total(self, count: int) -> int:
        """Return the sum of `count` over the ranks that see different rows."""
        return count if self.dp_size == 1 else int(self.sum(torch.tensor(count, device=self.device)))

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank."""
        if self.world == 1:
            return flag
        seen = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self.group)
        return bool(seen)

    def seen(self, flag: bool) -> torch.Tensor:
        """Return on how many ranks `flag` is set, [] on the device; the host does not wait for it."""
        count = torch.full((), int(flag), device=self.device)
        if self.world > 1:
            dist.all_reduce(count)
        return count

    def gathered(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order."""
        if self.world == 1:
            return [value]
        box = [None] * self.world
        dist.all_gather_object(box, value, group=self.group)
        return box

    def share(self, value: Any) -> Any:
        """Return the first rank's value."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            dist.barrier(group=self.group)

    @contextmanager
    def beside(self) -> Iterator[Ranks]:
        """Yield the same ranks for a thread beside the training, with a group of their own on CPUs.

        Collectives of one group must come in the same order on every rank, and those of two groups need not.
        """
        device = torch.device("cpu")
        if self.world == 1:
            yield replace(self, device=device)
            return
        group = dist.new_group(backend="gloo", timeout=meshes.PATIENCE)
        try:
            yield replace(self, device=device, group=group)
        finally:
            dist.destroy_process_group(group)


@contextmanager
def ranks(
    parallel: Parallel,
    *,
    experts: Collection[int] | None = (),
    heads: Collection[int] = (),
) -> Iterator[Ranks]:
    """Yield this process's rank: one of those that torchrun started, or a world of one.

    `experts` are the numbers of experts per layer, None if this rank does not know them; `heads` those of
    attention heads. Raises `UpcycleError` if the sizes do not fit, and if another process of the run is lost.
    """
    world = world_size()
    layout = parallel.layout(world)
    layout.refuse(world, experts=experts, heads=heads, prefix="parallel.")
    _of_environment("LOCAL_RANK", 0)
    device = meshes.device()
    if world == 1:
        yield Ranks(device=device)
        return
    mine = _join(world, device)
    try:
        place = layout.at(dist.get_rank())
        with _one_voice():
            yield Ranks(
                rank=dist.get_rank(),
                world=world,
                dp_rank=place.replicate * layout.fsdp + place.fsdp,
                dp_size=layout.dp,
                device=device,
                layout=layout,
                config=DistributedConfig(
                    dp_replicate_size=layout.replicate,
                    fsdp_size=layout.fsdp,
                    tp_size=layout.tp,
                    ep_size=layout.ep,
                ),
                dp_group=meshes.meshes(layout).data,
            )
    finally:
        if mine and dist.is_initialized():
            dist.destroy_process_group()


def _join(world: int, device: torch.device) -> bool:
    """Join the other processes; return whether this call did, and not somebody before."""
    if dist.is_initialized():
        if device.type != "cpu":
            torch.accelerator.set_device_index(device.index)
        return False
    if lacking := [name for name in _RENDEZVOUS if not os.environ.get(name)]:
        raise UpcycleError(
            f"WORLD_SIZE = {world} and there is no {listed(lacking)} in the environment; start with "
            f"torchrun, which sets them, or unset WORLD_SIZE"
        )
    meshes.start()
    return True


def world_size() -> int:
    """Return the number of processes that torchrun started. Raises `UpcycleError` for a bad environment."""
    world = _of_environment("WORLD_SIZE", 1)
    if (rank := _of_environment("RANK", 0)) < world:
        return world
    if os.environ.get("WORLD_SIZE"):
        raise UpcycleError(f"RANK = {rank} and WORLD_SIZE = {world}; start with torchrun")
    raise UpcycleError(
        f"RANK = {rank} and there is no WORLD_SIZE in the environment; start with torchrun, which sets both, "
        f"or unset RANK"
    )


@contextmanager
def _one_voice() -> Iterator[None]:
    """Let one process alone say what ends them all, and say in a sentence that a process was lost.

    A process that is lost because it ended by itself has said why.
    """
    try:
        yield
    except UpcycleError as error:
        error.elsewhere = not _first_to_say(str(error))
        raise
    except RuntimeError as error:
        if not _lost(error):
            raise
        ended = UpcycleError(
            _said()
            or "a process of this run has ended, or does not answer; the newest whole checkpoint is kept. "
            "Start all processes again with --resume"
        )
        ended.elsewhere = not _first_to_say(str(ended))
        raise ended from None


def _lost(error: RuntimeError) -> bool:
    """Return whether a collective failed because another process is gone; gloo has no error of its own."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def _first_to_say(sentence: str) -> bool:
    """Return whether no other process has said this yet, by the store where processes find each other."""
    key = f"said {hashlib.sha256(sentence.encode()).hexdigest()}"
    try:
        store = dist.distributed_c10d._get_default_store()
        store.compare_set(_ENDED, "", sentence)
        return bool(store.add(key, 1) == 1)
    except RuntimeError:  # the store is gone with its process
        return True


def _said() -> str | None:
    """Return the sentence with which a process has ended the run; None if none has, or nobody knows."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return str(store.get(_ENDED).decode()) if store.check([_ENDED]) else None
    except RuntimeError:  # the store is gone with its process
        return None


def _of_environment(name: str, default: int) -> int:
    """Return a number that torchrun sets. Raises `UpcycleError` for another value."""
    given = os.environ.get(name) or str(default)
    if not given.isdecimal() or (name == "WORLD_SIZE" and int(given) < 1):
        raise UpcycleError(
            f"{name} = {given!r} in the environment is no number of a process; start with torchrun, or unset "
            f"it"
        )
    return int(given)
