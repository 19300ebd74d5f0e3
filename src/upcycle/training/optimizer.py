"""Groups a model's parameters for an optimizer by weight decay, learning-rate factor and mesh."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from upcycle.errors import UpcycleError
from upcycle.training import roles
from upcycle.training.gradients import mesh_of
from upcycle.training.optimizers import Optimizer

# Name endings of learned tokens, and of added position embeddings.
_TOKENS = ("_token", "position_embeddings")


def make(
    model: PreTrainedModel,
    settings: Optimizer,
    scales: Mapping[str, float] | None = None,
    before: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    """Make the optimizer, with one group for each kind of tensor that must be updated together.

    `scales` are factors on the learning rate by parameter name, which `set_rate` applies. Every parameter has
    a state: the one that the earlier optimizer `before` has of it, or that before the first update. Tensors
    on different meshes are in different groups, because fused kernels need one kind at a time. Call it before
    the first forward pass: after it, FSDP2 exposes other tensors. Raises `UpcycleError` if the optimizer
    cannot update a sharded parameter.
    """
    groups: dict[Any, list[nn.Parameter]] = defaultdict(list)
    known = roles.roles(model) if settings.needs_roles else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            _refuse_shards(name, parameter, settings)
            scale = 1.0 if scales is None else scales[name]
            if known:
                scale *= settings.rate(known[name])
            role = known[name] if settings.by_role else None
            groups[(decays(name, parameter), scale, mesh_of(parameter), role)].append(parameter)
    made = settings.make(
        [
            {
                "params": members,
                "weight_decay": settings.weight_decay if decayed else 0.0,
                "scale": scale,
                **({} if role is None else {"role": role}),
            }
            for (decayed, scale, _, role), members in groups.items()
        ]
    )
    _fill(made, settings, {} if before is None else before.state)
    return made


def _fill(made: torch.optim.Optimizer, settings: Optimizer, known: Mapping[Tensor, Any]) -> None:
    """Give every parameter its `known` state, or that before its first update.

    A checkpoint needs a state for every parameter, also for one without a gradient so far (such as an unused
    mask token). torch's fused SGD begins all of a group or none, and leaves its memory unwritten if the first
    update is skipped.
    """
    for group in made.param_groups:
        for p in group["params"]:
            made.state[p] = known.get(p) or settings.begun(made, p)


def _refuse_shards(name: str, parameter: Tensor, settings: Optimizer) -> None:
    """Refuse a parameter that is sharded in a way that the optimizer cannot update."""
    if not isinstance(parameter, DTensor):
        return
    dims = sorted({placement.dim for placement in parameter.placements if hasattr(placement, "dim")})
    if dims and (why := settings.cannot_shard(tuple(parameter.shape), dims)) is not None:
        raise UpcycleError(
            f"optimizer.name = {settings.name} cannot train {name}, which ranks share: {why}; train on one "
            f"process, or take another optimizer"
        )


def decays(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay acts on a parameter.

    It acts on matrices, including those of experts and routers and embedding tables. It does not act on
    vectors (norms, biases, layer scale, scales and temperatures of routers), nor on parameters that are
    vectors but for their shape: biases of experts [E, I], response norms, class, distillation and mask
    tokens, and positions of images [1, N, H]. timm, mmpretrain, MoE Jetpack and ConvNeXt V2 do the same.
    """
    return parameter.ndim > 1 and not name.endswith(("bias", "grn.weight", "grn_weight", *_TOKENS))


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate to its factor times the schedule's rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def skip_if(optimizer: torch.optim.Optimizer, flag: Tensor) -> bool:
    """Let the next step change nothing if `flag`, [] on the device, is set.

    Fused optimizers can do so without asking the host; mixed precision with scaled losses needs it. Returns
    False if this optimizer cannot.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    optimizer.found_inf = flag.float()  # type: ignore[attr-defined]
    return True
