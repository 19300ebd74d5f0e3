"""The nearest semi-orthogonal matrix, by Newton-Schulz iterations, as torch.optim.Muon computes it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Coefficients of the quintic that Keller Jordan chose for the steepest slope at zero (2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_LEAST = 1e-7  # least norm that a matrix is divided by


def orthogonal(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Return about U V^T of every matrix U S V^T in [..., m, n], with singular values of 0.7 to 1.2.

    The products run in `dtype`, which is that of the result.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(dtype)
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_LEAST)
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


def factor(rows: int, columns: int, adjust: str) -> float:
    """Return what an orthogonal update of a matrix is multiplied by, beside the learning rate."""
    if adjust == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
