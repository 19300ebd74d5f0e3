"""entmax with alpha = 1.5, a sparse alternative to softmax (Peters, Niculae and Martins, ACL 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def entmax15(scores: Tensor, dim: int = -1) -> Tensor:
    """Return max(z / 2 - tau, 0)^2 for z = `scores`, with the exact tau for which it sums to one along `dim`.

    It maximises p z + H(p) over the simplex, where H is the Tsallis entropy (4 / 3) sum_i (p_i - p_i^1.5).
    """
    out: Tensor = _Entmax15.apply(scores, dim)
    return out


class _Entmax15(torch.autograd.Function):
    """Finds the threshold by sorting (their algorithm 2) and the gradient in closed form (proposition 2)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, dim: int) -> Tensor:
        half = scores / 2
        # Anything below the largest - 1 gets weight zero: the largest alone would already give 1^2 = 1.
        half = (half - half.amax(dim, keepdim=True)).clamp_(min=-1.0)
        weights = (half - _threshold(half, dim)).clamp_(min=0.0).square_()
        ctx.dim = dim
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        roots = weights.sqrt()
        # The Jacobian is diag(s) - s s^T / sum(s) with s = sqrt(p).
        mean = (gradient * roots).sum(ctx.dim, keepdim=True) / roots.sum(ctx.dim, keepdim=True)
        return (gradient - mean) * roots, None


def _threshold(half: Tensor, dim: int) -> Tensor:
    """Return tau along `dim`, kept as an axis of length one.

    If the k largest scores have weight, tau is the smaller root of sum_i (z_i - tau)^2 = 1 over them, which
    is mean - sqrt((1 - k variance) / k). The right k is the last one whose own z reaches tau.
    """
    ordered = half.sort(dim, descending=True).values
    count = torch.arange(1, half.shape[dim] + 1, device=half.device, dtype=half.dtype)
    count = count.view(-1, *[1] * (half.ndim - dim % half.ndim - 1))
    mean = ordered.cumsum(dim) / count
    variance = ordered.square().cumsum(dim) / count - mean.square()
    tau = mean - ((1 - count * variance) / count).clamp_(min=0.0).sqrt_()
    size = (tau <= ordered).sum(dim, keepdim=True)
    return tau.gather(dim, size - 1)
