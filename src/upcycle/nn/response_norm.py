"""Global response normalisation inside an expert (ConvNeXt V2, Woo et al., CVPR 2023, equations 1 to 4).

In a dense block the statistics are of all places of an image. An expert knows the tokens that came to it:
its statistics are of those, or of its slots. Where every token comes, it computes what the block does.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6  # as in transformers


def normalise(inner: Tensor, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Activations [M, I] of one expert, by the norm of each neuron over the tokens of the same row of tokens
    over the mean of these norms: weight x inner x ratio + bias + inner.

    `rows` [M] numbers the row, an image or a group, that each token is of; `weight` and `bias` are [I].
    """
    wide = inner.to(torch.promote_types(inner.dtype, torch.float32))
    several = int(rows.max()) + 1 if len(rows) else 0
    squares = wide.new_zeros(several, inner.shape[-1]).index_add(0, rows, wide.square())
    there = squares > 0  # the gradient of a root has no value at zero; a norm's is zero there
    norms = squares.where(there, 1.0).sqrt() * there
    ratio = norms / (norms.mean(-1, keepdim=True) + EPS)
    return (weight * (wide * ratio[rows]) + bias + wide).to(inner.dtype)
