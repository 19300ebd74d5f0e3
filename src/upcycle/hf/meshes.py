"""The process group and the device meshes of a layout: which ranks talk to each other.

Meshes are made once a layout. Each of them costs communicators.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from upcycle.sharding.layout import Layout

PATIENCE = timedelta(minutes=30)  # ranks that read a large checkpoint are ready at different times


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """The ranks of a layout in the two orders that it has them in."""

    dense: DeviceMesh  # dp_replicate, fsdp, tp
    expert: DeviceMesh | None  # dp_replicate, efsdp, ep; None without expert parallelism
    data: Any  # the process group of the ranks that see different rows

    @property
    def parameters(self) -> DeviceMesh:
        """The mesh over which FSDP shards everything but the experts that are shared out."""
        return _of_fsdp(self.dense, "fsdp")

    @property
    def experts(self) -> DeviceMesh:
        """The mesh over which FSDP shards the experts that are shared out."""
        assert self.expert is not None
        return _of_fsdp(self.expert, "efsdp")


_made: dict[Layout, tuple[Any, Meshes]] = {}


def device() -> torch.device:
    """Return the device of this process: the accelerator with torchrun's local number, or the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK") or 0))


def start() -> None:
    """Start the process group that torchrun's variables describe, unless there is one."""
    if dist.is_initialized():
        return
    here = device()
    if here.type != "cpu":
        torch.accelerator.set_device_index(here.index)
    backend = dist.get_default_backend_for_device(here.type)
    # With a device, NCCL splits its communicator for each mesh in one call, however many ranks there are.
    bound = here if backend == "nccl" else None
    dist.init_process_group(backend, timeout=PATIENCE, device_id=bound)


def meshes(layout: Layout) -> Meshes:
    """Return the meshes of a layout of the whole world; the process group must have been started."""
    group, found = _made.get(layout, (None, None))
    if found is None or group is not dist.group.WORLD:
        found = _meshes(layout)
        _made[layout] = (dist.group.WORLD, found)
    return found


def _meshes(layout: Layout) -> Meshes:
    kind = device().type
    dense = dist.init_device_mesh(
        kind,
        (layout.replicate, layout.fsdp, layout.tp),
        mesh_dim_names=("dp_replicate", "fsdp", "tp"),
    )
    expert = None
    if layout.ep > 1:
        expert = dist.init_device_mesh(
            kind,
            (layout.replicate, layout.efsdp, layout.ep),
            mesh_dim_names=("dp_replicate", "efsdp", "ep"),
        )
    return Meshes(dense=dense, expert=expert, data=_data(dense, layout))


def _data(dense: DeviceMesh, layout: Layout) -> Any:
    if layout.tp == 1:
        return dist.group.WORLD
    if layout.replicate == 1:
        return dense.get_group("fsdp")
    return dense[("dp_replicate", "fsdp")]._flatten("dp").get_group()


def _of_fsdp(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Return the axes that FSDP works on: it replicates along the first of two."""
    return mesh[("dp_replicate", name)] if mesh["dp_replicate"].size() > 1 else mesh[name]
