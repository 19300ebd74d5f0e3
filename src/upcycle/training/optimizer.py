"""AdamW over tensors that are whole, sharded, or on different meshes; norms and clipping across them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from upcycle.training.run import Train

_TOKENS = (
    "_token",
    "position_embeddings",
)  # how names of learned tokens end, and of positions that are added


def make(model: nn.Module, train: Train, scales: Mapping[str, float] | None = None) -> torch.optim.AdamW:
    """AdamW with one group for each kind of tensor that must be updated together.

    `scales` is what the rate of a parameter is multiplied by, by name; `set_rate` heeds it. Tensors of
    different meshes stay apart, because fused kernels take one kind at a time. Made before the first forward
    pass: FSDP2 shows other tensors after it.
    """
    groups: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 1.0 if scales is None else scales[name]
            groups[(decays(name, parameter), scale, _kind(parameter))].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": train.weight_decay if decayed else 0.0, "scale": scale}
            for (decayed, scale, _), members in groups.items()
        ],
        lr=0.0,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        fused=True,
    )


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter: on matrices, those of experts and routers and tables of
    embeddings among them.

    Not on vectors (norms, biases, layer scale, scales and temperatures of routers), nor on what is more than
    a vector by its shape alone: biases of experts [E, I], response norms, class, distillation and mask tokens
    and positions of images [1, N, H] (as timm, mmpretrain, MoE Jetpack and ConvNeXt V2 have it).
    """
    return parameter.ndim > 1 and not name.endswith(("bias", "grn.weight", "grn_weight", *_TOKENS))


def set_rate(adam: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its part of the schedule's rate."""
    for group in adam.param_groups:
        group["lr"] = lr * group["scale"]


def fill(adam: torch.optim.Optimizer) -> None:
    """Give a state to parameters that no gradient has reached yet (a mask token that is not used), as to the
    others: a checkpoint has one for every parameter."""
    for group in adam.param_groups:
        for p in group["params"]:
            if not adam.state[p]:
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[p] = {"step": torch.zeros((), device=p.device), **moments}


def _kind(tensor: Tensor) -> Any:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def local(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def squared_norms(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """The squared 2-norm of each gradient, whole, however it is sharded.

    `torch.nn.utils.clip_grad_norm_` refuses tensors of more than one mesh.
    """
    names = list(gradients)
    parts = torch.stack([_squared(local(gradients[n])) for n in names])
    kinds: dict[Any, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        kinds[_kind(gradients[name])].append(place)
    for kind, places in kinds.items():
        if kind is None:
            continue
        mesh, placements = kind
        mine = parts[places]
        for dim, placement in enumerate(placements):
            if placement.is_partial():
                raise AssertionError(f"the gradient of {names[places[0]]} is not reduced over {mesh}")
            if not placement.is_replicate():
                dist.all_reduce(mine, group=mesh.get_group(dim))
        parts[places] = mine
    return dict(zip(names, parts.tolist(), strict=True))


def _squared(part: Tensor) -> Tensor:
    wide = torch.promote_types(part.dtype, torch.float32)
    return torch.linalg.vector_norm(part, dtype=wide).double().square()


@torch.no_grad()
def scale(gradients: Iterable[Tensor], factor: float) -> None:
    """Multiply every gradient by `factor`, in place."""
    torch._foreach_mul_([local(g) for g in gradients], factor)
