"""Cross-entropy of a language model's head without all of its logits, in chunks of tokens.

The gradient is worked out in the forward pass, chunk by chunk, so that no logits wait for the backward pass
and none are computed twice (as in Liger Kernel, Hsu et al. 2024). `torch.nn.functional.linear_cross_entropy`
does the same since torch 2.13, but has no place for what some heads do after the linear map.

Letters: T tokens, H hidden, V words.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from upcycle.data.corruption import IGNORED
from upcycle.hf.heads import Head
from upcycle.nn import autocast
from upcycle.training import distillation, shared_words
from upcycle.training.distillation import Lesson, Losses
from upcycle.training.sections import Teacher

WORTH = 1 << 28  # bytes of float32 logits from which on chunks are worth their launches


def is_worth(tokens: int, words: int) -> bool:
    """Return whether the logits of that many tokens take so much memory that chunks are better."""
    return 4 * tokens * words >= WORTH


def cross_entropy(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Return the cross-entropy in nats summed over targets, [], for hidden states [..., H], labels [...]."""
    out: Tensor
    out, _ = _Chunked.apply(*_flat(hidden, labels, head), head.weight, head.bias, head, None)
    return out


def distilled(hidden: Tensor, labels: Tensor, head: Head, lesson: Lesson, teacher: Teacher) -> Losses:
    """Return the losses of `distillation.losses`, in chunks, for hidden states [..., H] and labels [...]."""
    flat = _flat(hidden, labels, head)
    total, told = _Chunked.apply(*flat, head.weight, head.bias, head, (lesson, teacher))
    return Losses(total=total, entropy=told[0], divergence=told[1])


@torch.no_grad()
def scores(hidden: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy and the number of targets whose logit is the largest, [] each."""
    states, targets = _flat(hidden, labels, head)
    weight, bias = head.weight.to(states.dtype), _cast(head.bias, states.dtype)
    loss, right = states.new_zeros((), dtype=torch.float32), targets.new_zeros(())
    with autocast.off(states.device.type):
        for part, wanted in _chunks(states, targets, weight):
            logits = head.finished(F.linear(part, weight, bias))
            if head.group is None:
                loss += _loss(logits, wanted)
                right += (logits.argmax(-1) == wanted).sum()
            else:
                loss += shared_words.Chances.of(logits, wanted, head).loss
                right += (shared_words.argmax(logits, head) == wanted).sum()
    return loss, right


def _flat(hidden: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Return states [T, H], in the type that the head computes in, and labels [T]."""
    dtype = autocast.dtype(hidden.device.type) or head.weight.dtype
    return hidden.flatten(0, -2).to(dtype), labels.flatten()


def _chunks(states: Tensor, labels: Tensor, weight: Tensor) -> Any:
    """Return pairs of chunks whose logits take about as much memory as all states."""
    size = _size(states, weight)
    return zip(states.split(size), labels.split(size), strict=True)


def _size(states: Tensor, weight: Tensor) -> int:
    words, width = weight.shape
    size = -(-len(states) // -(-words // width))
    return 1 << max(0, size - 1).bit_length()


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, reduction="sum", ignore_index=IGNORED)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _zeros(like: Tensor) -> Tensor:
    """Return where gradients of many chunks are summed: in float32 at least."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


class _Chunked(torch.autograd.Function):
    """Works out the gradients of all inputs in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        taught: tuple[Lesson, Teacher] | None,
    ) -> tuple[Tensor, Tensor]:
        of_states, _, of_weight, of_bias, *_ = ctx.needs_input_grad
        cast, cast_bias = weight.to(states.dtype), _cast(bias, states.dtype)
        sums = _zeros(weight) if of_weight else None
        bias_sums = _zeros(bias) if of_bias and bias is not None else None
        lessons = iter(taught[0].split(_size(states, cast)) if taught else ())
        losses, told, parts = [], [], []
        with autocast.off(states.device.type):
            for part, wanted in _chunks(states, labels, cast):
                products = F.linear(part, cast, cast_bias).requires_grad_()
                with torch.enable_grad():
                    logits, back = head.finished(products), None
                    if taught is not None:
                        found = distillation.losses(logits, wanted, next(lessons), taught[1])
                        loss = found.total
                        told.append(torch.stack(found.terms()))
                    elif head.group is None:
                        loss = _loss(logits, wanted)
                    else:
                        chances = shared_words.Chances.of(logits.detach(), wanted, head)
                        loss, logits = chances.loss, logits.to(chances.powers.dtype)
                        back = chances.gradient()
                losses.append(loss.detach())
                if not (of_states or of_weight or of_bias):
                    continue
                (error,) = torch.autograd.grad(loss if back is None else logits, products, back)
                if of_states:
                    parts.append(error @ cast)
                if sums is not None:
                    if sums.dtype == error.dtype:
                        sums.addmm_(error.T, part)
                    else:
                        sums += error.T @ part
                if bias_sums is not None:
                    bias_sums += error.sum(0)
        together = torch.cat(parts) if of_states else None
        if together is not None and head.group is not None:
            dist.all_reduce(together, group=head.group)  # each rank's words have had a part in it
        ctx.made = (
            together,
            _cast(sums, weight.dtype),
            None if bias is None else _cast(bias_sums, bias.dtype),
        )
        total = torch.stack(losses).sum()
        by_kind = torch.stack(told).sum(0) if told else total.new_zeros(0)
        ctx.mark_non_differentiable(by_kind)
        return total, by_kind

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias = (None if made is None else made.mul_(gradient) for made in ctx.made)
        del ctx.made
        return states, None, weight, bias, None, None
