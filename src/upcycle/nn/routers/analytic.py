"""Scores of a router that is made of one neuron for each expert (CMoE; Pei et al., arXiv 2502.04416)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from upcycle.errors import UpcycleError
from upcycle.nn.routers import Extra, Router
from upcycle.nn.routers.sigmoid import BIAS
from upcycle.tensors.computed import UnitRows

if TYPE_CHECKING:
    from upcycle.nn.routing import Routing, Tokens
    from upcycle.tensors.feed_forward import FeedForward
    from upcycle.tensors.lazy import Lazy

STD = 0.02  # initial std of the gate's rows, unless an initialisation makes them of neurons


@dataclass(frozen=True, kw_only=True)
class Analytic(Router):
    """The score of expert e is |(u_e x) act(g_e x)|, what neuron e of a gated network would put out.

    p is the softmax of the scores. A token takes the K experts with the largest p + bias, and the weight of a
    chosen expert is 1 + p_e s_e. The scales s start at 0, so that the outputs of chosen experts are summed.
    With the initialisation `cmoe`, u and g are rows of the dense network, of length one, without training.

    The bias gets no gradient; a training run moves it with `router.bias_update_rate` (CMoE: 0.001).
    """

    untrained = (BIAS,)
    even = True
    linear = False
    summary = "the score of a neuron for each expert; chosen experts are summed (CMoE)"

    # act; that of the dense network
    activation: Literal["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"] = "silu"

    def extra(self, num_experts: int, hidden: int) -> dict[str, Extra]:
        return {
            "gate_weight": Extra((num_experts, hidden), std=STD),
            "scale": Extra((num_experts,)),
            BIAS: Extra((num_experts,)),
        }

    def from_neurons(self, network: FeedForward, activation: str) -> dict[str, Lazy]:
        if activation != self.activation:
            raise UpcycleError(
                f"router.activation = {self.activation}, and the dense network has {activation}; give that"
            )
        assert network.gate is not None
        return {"weight": UnitRows(network.up), "gate_weight": UnitRows(network.gate)}

    def gate_sum(self, num_experts: int, top_k: int) -> float:
        return float(top_k)

    def sums_to_one(self, num_experts: int, top_k: int) -> bool:
        return False

    def reaches_all(self, num_experts: int, top_k: int) -> bool:
        return True

    def experts_per_token(self, num_experts: int, top_k: int, length: int) -> float:
        return float(top_k)

    def route(self, tokens: Tokens) -> Routing:
        import torch

        from upcycle.hf.parts import ACT2FN
        from upcycle.nn.dispatch import Choices
        from upcycle.nn.routing import Routing

        own = tokens.tensors
        gate = ACT2FN[self.activation](torch.nn.functional.linear(tokens.hidden, own["gate_weight"]))
        logits = (torch.nn.functional.linear(tokens.hidden, own["weight"]) * gate).abs()  # [G, N, E]
        probabilities = logits.softmax(-1)
        index = (probabilities.detach() + own[BIAS].detach()).topk(tokens.top_k, dim=-1).indices
        weights = 1 + (probabilities * own["scale"]).gather(-1, index)
        counts = tokens.counts_of(index)
        return Routing(
            dispatch=Choices(index=index.flatten(0, 1), weights=weights.flatten(0, 1), length=tokens.length),
            logits=logits.flatten(0, 1),
            probabilities=probabilities.flatten(0, 1),
            real=tokens.real_rows,
            counts=counts,
            left_behind=counts.new_zeros(()),
            groups=tokens.groups,
        )


router = Analytic
