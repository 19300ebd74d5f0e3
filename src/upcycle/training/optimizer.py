"""Groups of parameters for an optimizer: which decay, at which part of the rate, on which mesh."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from upcycle.errors import UpcycleError
from upcycle.training.gradients import mesh_of
from upcycle.training.optimizers import Optimizer

# How the names of learned tokens end, and those of positions that are added.
_TOKENS = ("_token", "position_embeddings")


def make(
    model: nn.Module, settings: Optimizer, scales: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer, with one group for each kind of tensor that must be updated together.

    `scales` is what the rate of a parameter is multiplied by, by name; `set_rate` heeds it. Tensors of
    different meshes stay apart, because fused kernels take one kind at a time. Made before the first forward
    pass: FSDP2 shows other tensors after it. Raises `UpcycleError` if the optimizer cannot update what ranks
    share.
    """
    groups: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            _refuse_shards(name, parameter, settings)
            scale = 1.0 if scales is None else scales[name]
            groups[(decays(name, parameter), scale, mesh_of(parameter))].append(parameter)
    return settings.make(
        [
            {"params": members, "weight_decay": settings.weight_decay if decayed else 0.0, "scale": scale}
            for (decayed, scale, _), members in groups.items()
        ]
    )


def _refuse_shards(name: str, parameter: Tensor, settings: Optimizer) -> None:
    """Refuse a parameter that ranks share in a way that the optimizer cannot update."""
    if not isinstance(parameter, DTensor):
        return
    dims = sorted({placement.dim for placement in parameter.placements if hasattr(placement, "dim")})
    if dims and (why := settings.cannot_shard(tuple(parameter.shape), dims)) is not None:
        raise UpcycleError(
            f"optimizer.name = {settings.name} cannot train {name}, which ranks share: {why}; train on one "
            f"process, or take another optimizer"
        )


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter: on matrices, those of experts and routers and tables of
    embeddings among them.

    Not on vectors (norms, biases, layer scale, scales and temperatures of routers), nor on what is more than
    a vector by its shape alone: biases of experts [E, I], response norms, class, distillation and mask tokens
    and positions of images [1, N, H] (as timm, mmpretrain, MoE Jetpack and ConvNeXt V2 have it).
    """
    return parameter.ndim > 1 and not name.endswith(("bias", "grn.weight", "grn_weight", *_TOKENS))


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its part of the schedule's rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def fill(optimizer: torch.optim.Optimizer, settings: Optimizer) -> None:
    """Give a state to parameters that no gradient has reached yet (a mask token that is not used), as to the
    others: a checkpoint has one for every parameter."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                optimizer.state[p] = settings.idle(p)
