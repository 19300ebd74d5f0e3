"""Expert Choice: each expert takes its best-scored tokens (Zhou et al. 2022; Sparse Upcycling, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from upcycle.nn.routers import Rounding, Router, capacity, places
from upcycle.settings import Above, AtLeast

if TYPE_CHECKING:
    from upcycle.nn.routing import Routing, Tokens


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(Router):
    """Each expert takes its C N / E best tokens of a group of N, by a softmax over experts.

    The number is rounded as in `capacity`. Padding is never taken and does not count. `normalize` divides a
    token's weights by their sum (Sparse Upcycling, B.7), so that a token that was taken keeps the dense
    function. A token that no expert took gets zero. `noise` adds N(0, (noise / E)^2) to the logits in
    training, for both choices and weights; vmoe's configurations use 1.
    """

    summary = "each expert takes its best tokens of a sequence or an image"
    looks_ahead = "an expert chooses among all tokens of a sequence, later ones included"
    balanced = True

    # average number of experts per token; num_experts gives every expert all tokens
    capacity_factor: Annotated[float, Above(0)] = 2.0
    # how the places of an expert are rounded: as in the code of V-MoE or Flaxformer, or to the nearest
    # (exact)
    rounding: Rounding = "exact"
    # noise on the logits in training, divided by the number of experts; None, 0: no noise
    noise: Annotated[float, AtLeast(0)] | None = None

    def share(self, num_experts: int, top_k: int) -> float:
        return self.capacity_factor / num_experts

    def gate_sum(self, num_experts: int, top_k: int) -> float:
        return 1.0 if self.normalize else min(1.0, self.share(num_experts, top_k))

    def sums_to_one(self, num_experts: int, top_k: int) -> bool:
        return self.normalize or self.reaches_all(num_experts, top_k)

    def reaches_all(self, num_experts: int, top_k: int) -> bool:
        return self.capacity_factor >= num_experts

    def experts_per_token(self, num_experts: int, top_k: int, length: int) -> float:
        return num_experts * capacity(length, self.share(num_experts, top_k), self.rounding) / length

    def route(self, tokens: Tokens) -> Routing:
        import torch

        from upcycle.nn.counts import counted
        from upcycle.nn.dispatch import Rows
        from upcycle.nn.routing import Routing

        groups, length, num_experts = tokens.groups, tokens.length, tokens.num_experts
        padding = tokens.padding
        logits = torch.nn.functional.linear(tokens.hidden, tokens.tensors["weight"])
        if tokens.training and self.noise:
            # Use torch's own generator: its state is restored when a layer is recomputed.
            logits = logits + self.noise / num_experts * torch.randn_like(logits)
        probabilities = logits.softmax(-1)
        scores = probabilities.transpose(1, 2)  # [G, E, N]
        if padding is not None:
            scores = scores.masked_fill(padding[:, None], -1.0)
        share = self.share(num_experts, tokens.top_k)
        most = capacity(length, share, self.rounding)
        weights, token = scores.topk(most, dim=-1)  # [G, E, C]
        flat = token + length * torch.arange(groups, device=token.device)[:, None, None]
        expert = torch.arange(num_experts, device=token.device)[:, None].expand_as(token)
        taken = None
        if padding is not None:  # a shorter group fills fewer places; the others have no expert
            own = places(length, padding, share, self.rounding)
            taken = torch.arange(most, device=token.device) < own[:, None, None]  # type: ignore[index]
            expert, weights = expert.where(taken, num_experts), weights.where(taken, 0.0)
            taken = taken.expand_as(token).transpose(0, 1).flatten()
        # Sort the rows by expert, as the experts' matrix products need them.
        rows, index, weights = (t.transpose(0, 1).flatten() for t in (flat, expert, weights))
        times = counted(rows, groups * length, taken)
        if self.normalize:
            sums = torch.zeros_like(probabilities[..., 0]).flatten().index_add(0, rows, weights)
            # A share can be too small for its type, and padding is taken by nobody: such rows get nothing.
            weights = weights / sums.masked_fill(sums < torch.finfo(sums.dtype).tiny, 1.0)[rows]
        return Routing(
            dispatch=Rows(
                tokens=rows, experts=index, weights=weights, length=length, some_left=taken is not None
            ),
            logits=logits.flatten(0, 1),
            probabilities=probabilities.flatten(0, 1),
            real=tokens.real_rows,
            counts=counted(index, num_experts + 1)[:num_experts],
            left_behind=tokens.number_of(times.view(groups, length) == 0),
            balanced=True,
            groups=groups,
        )


router = ExpertChoice
