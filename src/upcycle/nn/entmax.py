"""entmax with alpha = 1.5: softmax's sparse sibling (Peters, Niculae and Martins, ACL 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def entmax15(scores: Tensor, dim: int = -1) -> Tensor:
    """max(z / 2 - tau, 0)^2 with the tau at which it sums to one along `dim`, exactly, of z = `scores`.

    It maximises p z + H(p) over the simplex, H the Tsallis entropy (4 / 3) sum_i (p_i - p_i^1.5).
    """
    out: Tensor = _Entmax15.apply(scores, dim)
    return out


class _Entmax15(torch.autograd.Function):
    """The threshold by sorting (their algorithm 2), the gradient in closed form (proposition 2)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, dim: int) -> Tensor:
        half = scores / 2
        # Nothing below the largest - 1 has weight, because a square of one is all there is to give.
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
        # The Jacobian is diag(s) - s s^T / sum(s), of s = sqrt(p).
        mean = (gradient * roots).sum(ctx.dim, keepdim=True) / roots.sum(ctx.dim, keepdim=True)
        return (gradient - mean) * roots, None


def _threshold(half: Tensor, dim: int) -> Tensor:
    """tau along `dim`, kept as an axis of one.

    With the k largest alone it is the smaller root of sum_i (z_i - tau)^2 = 1, which is
    mean - sqrt((1 - k variance) / k); the right k is the last whose own z reaches it.
    """
    ordered = half.sort(dim, descending=True).values
    count = torch.arange(1, half.shape[dim] + 1, device=half.device, dtype=half.dtype)
    count = count.view(-1, *[1] * (half.ndim - dim % half.ndim - 1))
    mean = ordered.cumsum(dim) / count
    variance = ordered.square().cumsum(dim) / count - mean.square()
    tau = mean - ((1 - count * variance) / count).clamp_(min=0.0).sqrt_()
    size = (tau <= ordered).sum(dim, keepdim=True)
    return tau.gather(dim, size - 1)
