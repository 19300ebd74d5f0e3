"""How tokens reach experts and come back: what a router decided, as something that can be run.

Every dispatch calls `experts(rows [M, H], index [M, K], weights [M, K], groups)`, which gives [M, H]; the
first three are the form whose forward pass transformers' expert parallelism replaces, `groups()` says to
experts that ask of which group each row is, [M]. Letters: T tokens, G groups of N, S slots an expert.
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
    """A decision about tokens [T, H] that can be run."""

    @abc.abstractmethod
    def run(self, hidden: Tensor, experts: Run) -> Tensor:
        """The experts' weighted outputs for tokens [T, H], [T, H]."""


@dataclass(frozen=True, kw_only=True)
class Choices(Dispatch):
    """Each token goes to its K experts, none is left out: `index` and `weights` [T, K]; groups of `length`
    tokens."""

    index: Tensor
    weights: Tensor
    length: int

    def run(self, hidden: Tensor, experts: Run) -> Tensor:
        def groups() -> Tensor:
            return torch.arange(len(hidden), device=hidden.device) // self.length

        return experts(hidden, self.index, self.weights, groups)


@dataclass(frozen=True, kw_only=True)
class Rows(Dispatch):
    """Pairs of a token and an expert, any number for each: `tokens`, `experts` and `weights` [M]; groups of
    `length` tokens."""

    tokens: Tensor
    experts: Tensor
    weights: Tensor
    length: int

    def run(self, hidden: Tensor, experts: Run) -> Tensor:
        rows = _each(hidden[self.tokens], self.experts, lambda: self.tokens // self.length, experts)
        # Sums of many experts' outputs want more bits than the experts have.
        out = torch.zeros(hidden.shape, dtype=self.weights.dtype, device=hidden.device)
        return out.index_add(0, self.tokens, rows * self.weights[:, None]).to(hidden.dtype)


@dataclass(frozen=True, kw_only=True)
class Slots(Dispatch):
    """Soft MoE: each slot is a mixture of tokens, each token a mixture of slots; [G, N, E, S] both ways."""

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
    """Every row through its own expert, unweighted."""
    return experts(rows, index[:, None], torch.ones_like(index, dtype=rows.dtype)[:, None], groups)
