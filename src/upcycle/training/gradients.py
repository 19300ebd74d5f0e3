"""Norms and scaling of gradients that are whole, sharded, or on different meshes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def mesh_of(tensor: Tensor) -> Any:
    """Return the mesh and placements of a sharded tensor; None if it is whole."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def of(parameter: Tensor) -> Tensor:
    """Return this rank's part of the gradient, cut among ranks as the parameter is."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        return gradient.redistribute(placements=parameter.placements).to_local()
    return gradient


@torch.no_grad()
def squared_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the squared 2-norm of each of N whole gradients, [N] in float64, however they are sharded.

    `torch.nn.utils.clip_grad_norm_` does not accept tensors on several meshes.
    """
    squares = [_squared(local(gradient)) for gradient in gradients.values()]
    kinds: dict[Any, list[int]] = defaultdict(list)
    for place, gradient in enumerate(gradients.values()):
        kinds[mesh_of(gradient)].append(place)
    for kind, places in kinds.items():
        if kind is None:
            continue
        mesh, placements = kind
        mine = torch.stack([squares[place] for place in places])
        for dim, placement in enumerate(placements):
            if placement.is_partial():
                name = list(gradients)[places[0]]
                raise AssertionError(f"the gradient of {name} is not reduced over {mesh}")
            if not placement.is_replicate():
                dist.all_reduce(mine, group=mesh.get_group(dim))
        for place, square in zip(places, mine.unbind(), strict=True):
            squares[place] = square
    return torch.stack(squares)


def _squared(part: Tensor) -> Tensor:
    wide = torch.promote_types(part.dtype, torch.float32)
    return torch.linalg.vector_norm(part, dtype=wide).double().square()


@torch.no_grad()
def scale(gradients: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply every gradient by `factor`, [] on their device, in place."""
    torch._foreach_mul_([local(g) for g in gradients], factor.float())
