"""Experts on a CPU: all of the work of one expert, and then that of the next.

Grouped products make each intermediate result for all experts before the next one. Such a result is larger
than a cache, and rows are brought into the order of experts and back with slow accumulation. Here, an expert
gathers its rows, multiplies, gates, multiplies and weights them while they are in the cache, and in the end
a token sums its K results in one pass. The products and the order of every sum are those of grouped products,
so that results and gradients are the same to the bit on one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from upcycle.hf.parts import ACT2CLS, default_gate
from upcycle.nn import autocast, grouped
from upcycle.nn.experts import Experts


def run(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Run rows [M, H] through their experts `index` [M, K] and sum with `weights` [M, K]: [M, H].

    `experts` is the module that transformers gives its implementations. Grouped products take over unless it
    is whole, in float32 on a CPU, gated with SiLU and without biases.
    """
    if not _fits(experts, hidden, weights):
        return grouped.run(experts, hidden, index, weights)
    keeps = torch.is_grad_enabled()
    out: Tensor = _ExpertByExpert.apply(
        hidden, index, weights, experts.gate_up_proj, experts.down_proj, keeps
    )
    return out


_SILU = (nn.SiLU, ACT2CLS["silu"])


def _fits(experts: Any, hidden: Tensor, weights: Tensor) -> bool:
    if torch.compiler.is_compiling() or autocast.dtype("cpu") is not None or experts._is_expert_parallel:
        return False
    if not _is_plain(experts):
        return False
    given = (hidden, weights, experts.gate_up_proj, experts.down_proj)
    return all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.is_cpu for t in given)


def _is_plain(experts: Any) -> bool:
    """Return whether each expert computes down(silu(gate x) * (up x)), with the gate above up."""
    if not experts.has_gate or experts.has_bias or experts.has_post_expert_norm:
        return False
    if isinstance(experts, Experts):
        usual = not (experts.training and experts.dropout.p)
    else:
        usual = getattr(type(experts), "_apply_gate", None) is default_gate
    laid_out = experts.is_concatenated and not experts.is_transposed
    silu = type(experts.act_fn) in _SILU and not experts.act_fn._forward_hooks
    return usual and laid_out and silu


class _ExpertByExpert(torch.autograd.Function):
    """Stacked experts with `gate_up` [E, 2I, H] and `down` [E, H, I], forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, keeps: bool
    ) -> Tensor:
        chosen, order = index.flatten().sort()  # not stable, as it is for grouped products
        rows, factors = order // index.shape[1], weights.flatten().index_select(0, order)[:, None]
        # of each choice among the rows that are sorted by experts
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view(index.shape)
        ends = torch.searchsorted(chosen, torch.arange(len(down)), right=True).tolist()
        counts = [end - begin for begin, end in pairwise([0, *ends])]
        weighted = hidden.new_empty(len(order), hidden.shape[-1])
        kept: list[Tensor] = []
        by_rows = (rows, factors, weighted)
        for part, (gate_up_e, down_e) in _experts(counts, by_rows, (gate_up.mT, down.mT)):
            rows_e, factors_e, weighted_e = part
            given = hidden.index_select(0, rows_e)
            both = given @ gate_up_e
            gate, up = both.chunk(2, dim=-1)
            active = F.silu(gate)
            inner = active * up
            made = inner @ down_e
            torch.mul(made, factors_e, out=weighted_e)
            if keeps:
                kept += (given, both, active, inner, made)
        ctx.counts = counts
        ctx.save_for_backward(rows, factors, places, gate_up, down, *kept)
        return _summed(weighted, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, factors, places, gate_up, down, *kept = ctx.saved_tensors
        of_hidden, _, of_weights, of_gate_up, of_down, _ = ctx.needs_input_grad
        d_rows, d_factors = gradient.new_empty(len(rows), gradient.shape[-1]), torch.empty_like(factors)
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        for e, count in enumerate(ctx.counts):
            if not count:
                d_gate_up[e].zero_()
                d_down[e].zero_()
        by_rows = (rows, factors, d_factors, d_rows)
        by_experts = (gate_up, down, d_gate_up, d_down)
        for place, (part, weights_e) in enumerate(_experts(ctx.counts, by_rows, by_experts)):
            rows_e, factors_e, d_factors_e, d_rows_e = part
            gate_up_e, down_e, d_gate_up_e, d_down_e = weights_e
            given, both, active, inner, made = kept[5 * place : 5 * place + 5]
            gate, up = both.chunk(2, dim=-1)
            d_made = gradient.index_select(0, rows_e)
            if of_weights:
                torch.sum(d_made * made, -1, keepdim=True, out=d_factors_e)
            d_made *= factors_e
            if of_down:
                torch.mm(d_made.T, inner, out=d_down_e)
            d_inner = d_made @ down_e
            d_both = torch.empty_like(both)
            d_gate, d_up = d_both.chunk(2, dim=-1)
            torch.mul(d_inner, active, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d_inner.mul_(up), gate, grad_input=d_gate)
            if of_gate_up:
                torch.mm(d_both.T, given, out=d_gate_up_e)
            if of_hidden:
                torch.mm(d_both, gate_up_e, out=d_rows_e)
            del d_made, d_inner, d_both, d_gate, d_up  # the next expert's take their place in the cache
        # Grouped products sum a token's gradients in the order of experts.
        d_hidden = _summed(d_rows, places.sort(-1).values) if of_hidden else None
        d_weights = d_factors.take(places) if of_weights else None
        return d_hidden, None, d_weights, d_gate_up if of_gate_up else None, d_down if of_down else None, None


def _experts(
    counts: list[int], by_rows: Sequence[Tensor], by_experts: Sequence[Tensor]
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Yield, for each expert that has rows, its parts of sorted rows [M K, ...] and of stacks [E, ...]."""
    rows = zip(*(tensor.split(counts) for tensor in by_rows), strict=True)
    weights = zip(*(tensor.unbind() for tensor in by_experts), strict=True)
    for count, rows_e, weights_e in zip(counts, rows, weights, strict=True):
        if count:
            yield rows_e, weights_e


def _summed(rows: Tensor, places: Tensor) -> Tensor:
    """Return the sums of the rows at `places` [M, K], one after another: [M, H]."""
    return F.embedding_bag(places, rows, mode="sum")
