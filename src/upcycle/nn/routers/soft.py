"""Soft MoE: experts see mixtures of tokens (Puigcerver et al., ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.nn.routers import Extra
from upcycle.nn.routers._slots import SlotRouter

if TYPE_CHECKING:
    from upcycle.nn.routing import Routing, Tokens


@dataclass(frozen=True, kw_only=True)
class Soft(SlotRouter):
    """Each expert has `slots` rows of the weight.

    A slot is the softmax-weighted mean of all tokens of a sequence; a token is the softmax-weighted mean of
    all slots' outputs. Tokens and rows are normalised to length one, and their products are multiplied by a
    learned scale (section 2.3) that starts at 1.
    """

    summary = "experts see mixtures of tokens (Soft MoE)"

    def extra(self, num_experts: int, hidden: int) -> dict[str, Extra]:
        return {"scale": Extra((1,), value=1.0)}

    def route(self, tokens: Tokens) -> Routing:
        import torch

        unit = torch.nn.functional.normalize
        scaled = tokens.tensors["scale"] * unit(tokens.tensors["weight"], dim=-1)
        logits = torch.nn.functional.linear(unit(tokens.hidden, dim=-1), scaled)  # [G, N, E S]
        return self.routing(tokens, logits, logits.softmax(-1), logits)


router = Soft
