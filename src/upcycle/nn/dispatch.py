"""Dispatchers: a router's decision as an object that can run the experts.

Every dispatcher calls `experts(rows [M, H], index [M, K], weights [M, K], groups)`, which returns [M, H]. The
first three arguments match the forward pass that transformers' expert parallelism replaces. `groups()`
returns the group of each row, [M], for experts that need it. Letters: T tokens, G groups of N, S slots per
expert.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Groups = Callable[[], Tensor]
Run = Callable[[Tensor, Tensor, Tensor, Groups], Tensor]


class Dispatch(abc.ABC):
    """A routing decision about tokens [T, H] that can be run.

    `some_left` says that there may be rows whose expert is number E, which is none; their weight is zero.
    """

    some_left: bool = False

    @abc.abstractmethod
    def run(self, hidden: Tensor, experts: Run) -> Tensor:
        """Return the experts' weighted outputs [T, H] for tokens [T, H]."""


@dataclass(frozen=True, kw_only=True)
class Choices(Dispatch):
    """Each token goes to its K experts and none is left out.

    `index` and `weights` are [T, K]; a group has `length` tokens.
    """

    index: Tensor
    weights: Tensor
    length: int

    def run(self, hidden: Tensor, experts: Run) -> Tensor:
        def groups() -> Tensor:
            return torch.arange(len(hidden), device=hidden.device) // self.length

        return experts(hidden, self.index, self.weights, groups)


@dataclass(frozen=True, kw_only=True)
class Rows(Dispatch):
    """Pairs of a token and an expert, any number for each.

    `tokens`, `experts` and `weights` are [M]; a group has `length` tokens.
    """

    tokens: Tensor
    experts: Tensor
    weights: Tensor
    length: int
    some_left: bool = False

    def run(self, hidden: Tensor, experts: Run) -> Tensor:
        rows = _each(hidden[self.tokens], self.experts, lambda: self.tokens // self.length, experts)
        # Sum in the type of the weights: a sum over many experts needs more precision than the experts' type
        # has.
        out = torch.zeros(hidden.shape, dtype=self.weights.dtype, device=hidden.device)
        return out.index_add(0, self.tokens, rows * self.weights[:, None]).to(
            torch.promote_types(hidden.dtype, rows.dtype)  # the experts' may be wider (`Experts`)
        )


@dataclass(frozen=True, kw_only=True)
class Slots(Dispatch):
    """Soft MoE: each slot is a mixture of tokens and each token a mixture of slots.

    Both tensors are [G, N, E, S].
    """

    dispatch: Tensor
    combine: Tensor

    def run(self, hidden: Tensor, experts: Run) -> Tensor:
        groups, length, count, slots = self.dispatch.shape
        grouped = hidden.view(groups, length, -1)
        mixed = torch.einsum("gnes,gnh->egsh", self.dispatch.to(hidden.dtype), grouped)
        index = torch.arange(count, device=hidden.device).repeat_interleave(groups * slots)

        def of_group() -> Tensor:
            return torch.arange(groups, device=hidden.device).repeat_interleave(slots).repeat(count)

        rows = _each(mixed.reshape(-1, hidden.shape[-1]), index, of_group, experts)
        made = rows.view(count, groups, slots, -1)
        return torch.einsum("gnes,egsh->gnh", self.combine.to(made.dtype), made).reshape(hidden.shape)


def _each(rows: Tensor, index: Tensor, groups: Groups, experts: Run) -> Tensor:
    """Run every row through its own expert, unweighted."""
    return experts(rows, index[:, None], torch.ones_like(index, dtype=rows.dtype)[:, None], groups)
