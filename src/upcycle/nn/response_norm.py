"""Global response normalisation inside an expert (ConvNeXt V2, Woo et al., CVPR 2023, equations 1 to 4).

A dense block takes the statistics over all positions of an image. An expert sees only the tokens or slots
routed to it, and takes the statistics over those. If it sees every token, it computes what the dense block
does.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6  # as in transformers


def normalise(inner: Tensor, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise the activations [M, I] of one expert: weight x inner x ratio + bias + inner.

    `ratio` is each neuron's norm over the tokens of one row, divided by the mean of these norms over neurons.
    `rows` [M] is the row (an image or a group) that each token belongs to; `weight` and `bias` are [I].
    """
    wide = inner.to(torch.promote_types(inner.dtype, torch.float32))
    several = int(rows.max()) + 1 if len(rows) else 0
    squares = wide.new_zeros(several, inner.shape[-1]).index_add(0, rows, wide.square())
    there = squares > 0  # sqrt has no gradient at zero; the norm's gradient there is zero
    norms = squares.where(there, 1.0).sqrt() * there
    ratio = norms / (norms.mean(-1, keepdim=True) + EPS)
    return (weight * (wide * ratio[rows]) + bias + wide).to(inner.dtype)
