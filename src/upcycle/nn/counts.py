"""Counts of whole numbers in a tensor that do not make the host wait for an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor


def counted(numbers: Tensor, size: int, there: Tensor | None = None) -> Tensor:
    """Return how often each of 0 to `size` - 1 is among `numbers`, [size] of int64.

    Numbers count only if `there`, of the same shape, is True. `torch.bincount` does the same, but it first
    asks the device for the largest number.
    """
    flat = numbers.flatten()
    if flat.device.type == "cuda":  # one kernel with a histogram in shared memory; it leaves out -1
        kept = flat if there is None else flat.masked_fill(~there.flatten(), -1)
        return torch.histc(kept.int(), bins=size, min=0, max=size - 1).long()
    ones = torch.ones_like(flat) if there is None else there.flatten().to(flat.dtype)
    return flat.new_zeros(size).scatter_add_(0, flat, ones)
