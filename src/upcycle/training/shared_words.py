"""Cross-entropy of logits of which each rank has those of some words, as under tensor parallelism.

Ranks exchange three numbers a token instead of its logits (Megatron-LM, Shoeybi et al. 2019, section 3).

Letters: T tokens, V' words of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from upcycle.data.corruption import IGNORED
from upcycle.hf.heads import Head


@dataclass(frozen=True, kw_only=True)
class Chances:
    """The softmax of T tokens over the words of all ranks."""

    loss: Tensor  # [], summed over targets, the same on all ranks
    powers: Tensor  # [T, V'], exp(logit - largest logit of all ranks), float32 or wider
    total: Tensor  # [T], sum of the powers of all ranks
    place: Tensor  # [T], of the label among this rank's words
    here: Tensor  # [T], whether the label is one of them
    real: Tensor  # [T], whether there is a label

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, head: Head) -> Chances:
        """Compute them from logits [T, V'] of this rank's words and labels [T]."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        most = wide.amax(-1)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=head.group)
        powers = (wide - most[:, None]).exp()
        mine = labels - head.first
        here = (mine >= 0) & (mine < wide.shape[-1])
        place = mine.clamp(0, wide.shape[-1] - 1)
        label = wide.gather(-1, place[:, None]).squeeze(-1).where(here, 0.0)
        sums = torch.stack([powers.sum(-1), label])
        dist.all_reduce(sums, group=head.group)
        total, label = sums.unbind()
        real = labels != IGNORED
        loss = (total.log() + most - label).where(real, 0.0).sum()
        return cls(loss=loss, powers=powers, total=total, place=place, here=here, real=real)

    def gradient(self) -> Tensor:
        """Return the gradient of the loss to this rank's logits, [T, V']."""
        out = self.powers / self.total[:, None]
        out.scatter_add_(-1, self.place[:, None], -self.here.to(out.dtype)[:, None])
        return out * self.real[:, None]


def argmax(logits: Tensor, head: Head) -> Tensor:
    """Return the word with the largest logit of all ranks, the first one of several, [T]."""
    largest, place = logits.max(-1)
    most = largest.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=head.group)
    word = (place + head.first).where(largest == most, torch.iinfo(place.dtype).max)
    dist.all_reduce(word, op=dist.ReduceOp.MIN, group=head.group)
    return word
