"""Distillation: the loss of a model that learns from another one's probabilities besides the data.

Letters: T tokens, V words, K words with the teacher's largest logits, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from upcycle.data.corruption import IGNORED
from upcycle.hf.heads import Head
from upcycle.training.sections import Teacher


class Lesson(Protocol):
    """A teacher's probabilities of the words after T tokens."""

    def split(self, size: int) -> Sequence[Lesson]:
        """Return lessons about `size` tokens each, in order."""

    def divergence(self, logits: Tensor, temperature: float) -> Tensor:
        """Return KL(teacher || student) of each token in nats, [T], for the student's logits [T, V]."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """All of the teacher's logits."""

    logits: Tensor  # [T, V]

    def split(self, size: int) -> list[Whole]:
        return [Whole(logits=part) for part in self.logits.split(size)]

    def divergence(self, logits: Tensor, temperature: float) -> Tensor:
        wanted = _logs(self.logits, temperature)
        return (wanted.exp() * (wanted - _logs(logits, temperature))).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Unheaded:
    """The teacher's last hidden states and its head, whose logits are computed when they are asked for."""

    states: Tensor  # [T, H]
    head: Head

    def split(self, size: int) -> list[Unheaded]:
        return [Unheaded(states=part, head=self.head) for part in self.states.split(size)]

    def divergence(self, logits: Tensor, temperature: float) -> Tensor:
        dtype, bias = self.states.dtype, self.head.bias
        products = F.linear(self.states, self.head.weight.to(dtype), None if bias is None else bias.to(dtype))
        return Whole(logits=self.head.finished(products)).divergence(logits, temperature)


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The teacher's K most probable words; all others are one word, of which only the sum is known.

    The divergence is that of K + 1 words. By the data processing inequality it is at most that of V words,
    and it is the same if K = V.
    """

    logs: Tensor  # [T, K], logarithms of the probabilities at the teacher's temperature
    ids: Tensor  # [T, K]

    @classmethod
    def of(cls, logits: Tensor, count: int, temperature: float) -> Largest:
        """Return the `count` largest of all logits [T, V]."""
        logs, ids = _logs(logits, temperature).topk(count, dim=-1)
        return cls(logs=logs, ids=ids)

    def split(self, size: int) -> list[Largest]:
        parts = zip(self.logs.split(size), self.ids.split(size), strict=True)
        return [Largest(logs=logs, ids=ids) for logs, ids in parts]

    def divergence(self, logits: Tensor, temperature: float) -> Tensor:
        mine = _logs(logits, temperature).gather(-1, self.ids)
        known = (self.logs.exp() * (self.logs - mine)).sum(-1)
        rest, my_rest = _rest(self.logs), _rest(mine)
        return known + rest.exp() * (rest - my_rest)


def _logs(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide / temperature).log_softmax(-1)


def _rest(logs: Tensor) -> Tensor:
    """Return the logarithm of what probabilities leave of one; of rounding's size, if they leave nothing."""
    left = 1 - logs.exp().sum(-1)
    return left.clamp(min=torch.finfo(left.dtype).eps).log()


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of a part of a batch, summed over its targets, in nats: [] each."""

    total: Tensor  # the one with a gradient
    entropy: Tensor
    divergence: Tensor | None = None  # None without a teacher

    def terms(self) -> list[Tensor]:
        """Return the parts without a gradient: the cross-entropy, and the divergence if there is one."""
        found = [self.entropy] if self.divergence is None else [self.entropy, self.divergence]
        return [each.detach() for each in found]


def losses(logits: Tensor, labels: Tensor, lesson: Lesson, teacher: Teacher) -> Losses:
    """Return the losses of T targets for the student's logits [T, V] and labels [T].

    The total is (1 - w) CE + w t^2 KL(p || q), where p and q are the softmax of the teacher's and the
    student's logits over the temperature t, and w is the weight (Hinton, Vinyals and Dean 2015, section 2:
    gradients of soft targets scale as 1 / t^2, so that t^2 keeps their share). Their soft cross-entropy
    differs from KL by the teacher's entropy, which has no gradient.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    entropy = F.cross_entropy(wide, labels, reduction="sum", ignore_index=IGNORED)
    each = lesson.divergence(logits, teacher.temperature)
    divergence = each.where(labels != IGNORED, 0.0).sum()
    total = teacher.weight * teacher.temperature**2 * divergence
    if teacher.weight < 1:
        total = total + (1 - teacher.weight) * entropy
    return Losses(total=total, entropy=entropy, divergence=divergence)
