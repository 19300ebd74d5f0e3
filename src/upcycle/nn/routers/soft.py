"""Soft MoE: experts see mixtures of tokens (Puigcerver et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.errors import UpcycleError
from upcycle.nn.routers import Router

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.nn.routing import Routing


@dataclass(frozen=True, kw_only=True)
class Soft(Router):
    """Each expert has `slots` rows of the weight. A slot is the softmax-weighted mean of all tokens of a
    sequence, a token the softmax-weighted mean of all slots' outputs. Tokens and rows are normalised to
    length one and their products multiplied by a learned scale (section 2.3), which starts at 1.
    """

    summary = "experts see mixtures of tokens (Soft MoE)"
    looks_ahead = "a slot mixes all tokens of a sequence, later ones included"
    balanced = True

    slots: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots < 1:
            raise UpcycleError(f"router.slots = {self.slots}; it must be 1 or more")

    def rows(self, num_experts: int) -> int:
        return num_experts * self.slots

    def extra(self, num_experts: int) -> dict[str, tuple[tuple[int, ...], float]]:
        return {"scale": ((1,), 1.0)}

    def gate_sum(self, num_experts: int, top_k: int) -> float:
        return 1.0

    def reaches_all(self, num_experts: int, top_k: int) -> bool:
        return False  # every token reaches slots, but a slot is no token

    def experts_per_token(self, num_experts: int, top_k: int, length: int) -> float:
        return num_experts * self.slots / length

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

        from upcycle.nn.dispatch import Slots
        from upcycle.nn.routing import Routing

        unit = torch.nn.functional.normalize
        scaled = tensors["scale"] * unit(tensors["weight"], dim=-1)
        logits = torch.nn.functional.linear(unit(hidden, dim=-1), scaled)  # [G, N, E S]
        shape = (*hidden.shape[:2], num_experts, self.slots)
        # Not -inf: in a row that is all padding the softmax over tokens would be NaN.
        least = torch.finfo(logits.dtype).min
        masked = logits if padding is None else logits.masked_fill(padding[..., None], least)
        combine = logits.softmax(-1)
        if padding is not None:
            combine = combine.masked_fill(padding[..., None], 0.0)
        real = slice(None) if padding is None else ~padding.flatten()
        by_expert = combine.view(shape).sum(-1).flatten(0, 1)[real]
        rows = hidden.shape[0] * self.slots
        return Routing(
            dispatch=Slots(dispatch=masked.softmax(1).view(shape), combine=combine.view(shape)),
            logits=logits.view(shape).logsumexp(-1).flatten(0, 1)[real],
            probabilities=by_expert,
            counts=torch.full((num_experts,), rows, device=hidden.device),
            left_behind=torch.zeros((), dtype=torch.long, device=hidden.device),
            balanced=True,
            groups=hidden.shape[0],
        )


router = Soft
