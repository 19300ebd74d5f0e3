"""The common part of the slot routers: experts see mixtures of tokens, S for each expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from upcycle.nn.routers import Router
from upcycle.settings import AtLeast

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.nn.routing import Routing, Tokens


@dataclass(frozen=True, kw_only=True)
class SlotRouter(Router):
    """Each expert has `slots` rows of the weight.

    A slot is a weighted mean of all tokens of a sequence; a token is a weighted mean of all slots' outputs.
    """

    looks_ahead = "a slot mixes all tokens of a sequence, later ones included"
    balanced = True
    has_slots = True
    linear = False

    slots: Annotated[int, AtLeast(1)] = 1  # slots per expert

    def rows(self, num_experts: int) -> int:
        return num_experts * self.slots

    def gate_sum(self, num_experts: int, top_k: int) -> float:
        return 1.0

    def reaches_all(self, num_experts: int, top_k: int) -> bool:
        return False  # every token reaches slots, but a slot is not a token

    def experts_per_token(self, num_experts: int, top_k: int, length: int) -> float:
        return num_experts * self.slots / length

    def routing(
        self, tokens: Tokens, into: Tensor, back: Tensor, logits: Tensor, kept: Tensor | None = None
    ) -> Routing:
        """Build the routing from scores, [G, N, E S] each.

        A softmax over tokens makes slots from `into`. `back` is each token's weights for slots, and `logits`
        the scores that `back` came from. `kept` [G, 1, E or 1, 1] multiplies the experts' outputs.
        """
        import torch

        from upcycle.nn.dispatch import Slots
        from upcycle.nn.routing import Routing

        padding, num_experts = tokens.padding, tokens.num_experts
        shape = (tokens.groups, tokens.length, num_experts, self.slots)
        # Not -inf: in a row of padding alone, the softmax over tokens would be NaN.
        least = torch.finfo(into.dtype).min
        masked = into if padding is None else into.masked_fill(padding[..., None], least)
        if padding is not None:
            back = back.masked_fill(padding[..., None], 0.0)
        combine = back.view(shape)
        return Routing(
            dispatch=Slots(
                dispatch=masked.softmax(1).view(shape), combine=combine if kept is None else combine * kept
            ),
            logits=logits.view(shape).logsumexp(-1).flatten(0, 1),
            probabilities=combine.sum(-1).flatten(0, 1),
            real=tokens.real_rows,
            counts=torch.full((num_experts,), tokens.groups * self.slots, device=into.device),
            left_behind=torch.zeros((), dtype=torch.long, device=into.device),
            balanced=True,
            groups=tokens.groups,
        )
