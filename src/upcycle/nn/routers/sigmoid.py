"""Sigmoid scores with a bias that balances them without a loss (DeepSeek-V3; Wang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.nn.routers import Extra, Router

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.nn.routing import Routing, Tokens

BIAS = "e_score_correction_bias"


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Router):
    """Each expert's score is its own sigmoid.

    A token takes the K experts with the largest score + bias and weights them by their scores, which
    `normalize` makes sum to one.

    The bias gets no gradient; a training run moves it with `router.bias_update_rate`, beside the balance loss
    unless `router.balance_loss_coef` is 0.

    A sum of scores that is too small to divide by is left out: such scores are zero, as in transformers.
    """

    untrained = (BIAS,)
    shares_one = True
    summary = "sigmoid scores, a balancing bias without a loss"

    def extra(self, num_experts: int, hidden: int) -> dict[str, Extra]:
        return {BIAS: Extra((num_experts,))}

    def gate_sum(self, num_experts: int, top_k: int) -> float:
        return 1.0 if self.normalize else top_k / 2  # sigmoid(0) = 1/2

    def reaches_all(self, num_experts: int, top_k: int) -> bool:
        return True

    def experts_per_token(self, num_experts: int, top_k: int, length: int) -> float:
        return float(top_k)

    def route(self, tokens: Tokens) -> Routing:
        import torch

        from upcycle.nn.dispatch import Choices
        from upcycle.nn.routing import Routing

        logits = torch.nn.functional.linear(tokens.hidden, tokens.tensors["weight"])  # [G, N, E]
        scores = logits.sigmoid()
        index = (scores.detach() + tokens.tensors[BIAS].detach()).topk(tokens.top_k, dim=-1).indices
        weights = scores.gather(-1, index)
        if self.normalize:
            weights = _shares(weights)
        counts = tokens.counts_of(index)
        return Routing(
            dispatch=Choices(index=index.flatten(0, 1), weights=weights.flatten(0, 1), length=tokens.length),
            logits=logits.flatten(0, 1),
            probabilities=_shares(scores).flatten(0, 1),
            real=tokens.real_rows,
            counts=counts,
            left_behind=counts.new_zeros(()),
            groups=tokens.groups,
        )


def _shares(scores: Tensor) -> Tensor:
    """Return scores [..., K] divided by their sum, or as they are if it is below the smallest normal number.

    That is so if all logits are below about -87. Then the quotient or its gradient would be NaN.
    """
    import torch

    sums = scores.sum(-1, keepdim=True)
    return scores / sums.masked_fill(sums < torch.finfo(sums.dtype).tiny, 1.0)


router = Sigmoid
