"""Sigmoid scores with a bias that balances them without a loss (DeepSeek-V3; Wang et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.nn.routers import Extra, Router

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.nn.routing import Routing

BIAS = "e_score_correction_bias"


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Router):
    """Each expert's score is a sigmoid of its own; a token takes the K experts of the largest score + bias
    and weighs them by their scores, which `normalize` makes sum to one. `router.bias_update_rate` of a run
    moves the bias, which has no gradient.
    """

    untrained = (BIAS,)
    summary = "sigmoid scores, a balancing bias without a loss"

    def extra(self, num_experts: int, hidden: int) -> dict[str, Extra]:
        return {BIAS: Extra((num_experts,))}

    def gate_sum(self, num_experts: int, top_k: int) -> float:
        return 1.0 if self.normalize else top_k / 2  # sigmoid(0) = 1/2

    def reaches_all(self, num_experts: int, top_k: int) -> bool:
        return True

    def experts_per_token(self, num_experts: int, top_k: int, length: int) -> float:
        return float(top_k)

    def route(
        self,
        tensors: Mapping[str, Tensor],
        hidden: Tensor,
        padding: Tensor | None,
        *,
        num_experts: int,
        top_k: int,
        training: bool,
        causal: bool,
    ) -> Routing:
        import torch

        from upcycle.nn.dispatch import Choices
        from upcycle.nn.routing import Routing

        logits = torch.nn.functional.linear(hidden, tensors["weight"]).flatten(0, 1)
        scores = logits.sigmoid()
        index = (scores.detach() + tensors[BIAS].detach()).topk(top_k, dim=-1).indices
        weights = scores.gather(-1, index)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        real = slice(None) if padding is None else ~padding.flatten()
        counts = torch.bincount(index[real].flatten(), minlength=num_experts)
        return Routing(
            dispatch=Choices(index=index, weights=weights, length=hidden.shape[1]),
            logits=logits[real],
            probabilities=(scores / scores.sum(-1, keepdim=True))[real],
            counts=counts,
            left_behind=counts.new_zeros(()),
            groups=hidden.shape[0],
        )


router = Sigmoid
