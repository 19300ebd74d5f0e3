"""SpheroMoE: queries of unit length attend to tokens (MoE Jetpack, Zhu et al., NeurIPS 2024, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from upcycle.nn.routers import Extra
from upcycle.nn.routers._slots import SlotRouter
from upcycle.settings import Above, AtLeast, Within

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.nn.routing import Routing, Tokens

KEY_STD = 0.02  # of the key projection at its start, as transformers starts a ViT's matrices
NORM_EPS = 1e-5  # of the queries' LayerNorm

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "init": "normal",
        "std": 0.02,
        "keys": "projected",
        "key_norm": False,
        "query_norm": "inherited",
        "temperatures": 1,
        # "A large value": keys as they start give products of deviation 0.02 sqrt(H), 0.28 in a ViT-T, so
        # that at 1 a slot begins as a mean over nearly all tokens.
        "temperature": 1.0,
        "combine": "softmax",
        "noise_after": False,
        "noise_in_eval": False,
    },
    "repo": {
        "init": "orthogonal",
        "std": 294**-0.5,  # orthonormal columns for its 98 + 196 queries
        "keys": "plain",
        "key_norm": True,
        "query_norm": "fresh",
        "temperatures": 2,
        "temperature": 0.5,
        "combine": "entmax15",
        "noise_after": True,
        "noise_in_eval": True,
    },
}


@dataclass(frozen=True, kw_only=True)
class Spherical(SlotRouter):
    """Each expert has `slots` queries, the rows of the weight, which a LayerNorm and a division by their
    length put on a sphere. Their products with the keys of the tokens, divided by a learned temperature, are
    softmaxed over tokens to make slots, and turned into each token's weights for all slots (Algorithm 1).

    `preset` sets what is not given: `paper` is MoE Jetpack's text, `repo` its released code.
    `keys`: a linear map of the tokens, or `plain` the tokens; `key_norm`: whether they have length one.
    `query_norm`: the LayerNorm starts as that of the block before the network, or `fresh` as the identity.
    `temperatures`: one for both directions or one each, starting at `temperature`. `combine`: what makes
    weights for slots. `noise`: of N(0, 1) on the products, 1 / E where it is not given; `noise_after` the
    division by temperature or before it; without `noise_in_eval` in training alone.
    `expert_dropout`: the chance that an expert's outputs are left out of a group in training, those of the
    others being divided by what is left; `branch_dropout`: that all outputs of a group are (the code's rate
    grows with the depth, to 0.1).
    """

    summary = "experts see mixtures of tokens, chosen on a sphere (SpheroMoE)"

    # sets what is not given: MoE Jetpack's text (paper) or its released code (repo)
    preset: Literal["paper", "repo"] = "paper"
    # how the queries start, as the weight of other routers does
    init: str | None = None  # type: ignore[assignment]
    # of the queries
    std: Annotated[float, AtLeast(0)] | None = None  # type: ignore[assignment]
    # a linear map of the tokens (projected), or the tokens (plain)
    keys: Literal["projected", "plain"] | None = None
    key_norm: bool | None = None  # whether keys have length one
    # whether the queries' LayerNorm starts as that of the block before the network, or as the identity
    query_norm: Literal["inherited", "fresh"] | None = None
    temperatures: Annotated[int, Within("[1, 2]")] | None = None  # one for both directions, or one each
    temperature: Annotated[float, Above(0)] | None = None  # that they start at
    combine: Literal["softmax", "entmax15"] | None = None  # what makes weights for slots
    noise: Annotated[float, AtLeast(0)] | None = None  # of N(0, 1) on the products; none: 1 / E
    noise_after: bool | None = None  # whether noise comes after the division by temperature
    noise_in_eval: bool | None = None  # whether there is noise outside training
    # chance that an expert's outputs are left out of a group in training
    expert_dropout: Annotated[float, Within("[0, 1)")] = 0.0
    branch_dropout: Annotated[float, Within("[0, 1)")] = 0.0  # chance that all outputs of a group are

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def extra(self, num_experts: int, hidden: int) -> dict[str, Extra]:
        assert self.temperature is not None
        assert self.temperatures is not None
        inherits = self.query_norm == "inherited"
        out = {
            "query_norm_weight": Extra((hidden,), value=1.0, inherited="weight" if inherits else None),
            "query_norm_bias": Extra((hidden,), inherited="bias" if inherits else None),
            "temperature": Extra((self.temperatures,), value=self.temperature),
        }
        if self.keys == "projected":
            out["key_weight"] = Extra((hidden, hidden), std=KEY_STD)
            out["key_bias"] = Extra((hidden,))
        return out

    def route(self, tokens: Tokens) -> Routing:
        import torch
        import torch.nn.functional as F  # noqa: N812

        from upcycle.nn.entmax import entmax15

        tensors, num_experts = tokens.tensors, tokens.num_experts
        keys = tokens.hidden
        if self.keys == "projected":
            keys = F.linear(keys, tensors["key_weight"], tensors["key_bias"])
        if self.key_norm:
            keys = F.normalize(keys, dim=-1)
        norm = (tensors["query_norm_weight"], tensors["query_norm_bias"])
        queries = F.layer_norm(tensors["weight"], tokens.hidden.shape[-1:], *norm, NORM_EPS)
        products = F.linear(keys, F.normalize(queries, dim=-1))  # [G, N, E S]
        # From torch's own generator, which a layer that is recomputed finds as it was.
        scale = 1 / num_experts if self.noise is None else self.noise
        noisy = scale and (tokens.training or self.noise_in_eval)
        noise = scale * torch.randn_like(products) if noisy else None
        if noise is not None and not self.noise_after:
            products = products + noise
        first, last = tensors["temperature"][0], tensors["temperature"][-1]
        into, back = products / first, products / last
        if noise is not None and self.noise_after:
            into, back = into + noise, back + noise
        weights = entmax15(back, dim=-1) if self.combine == "entmax15" else back.softmax(-1)
        kept = self._kept(tokens.groups, num_experts, products) if tokens.training else None
        return self.routing(tokens, into, weights, back, kept)

    def _kept(self, groups: int, num_experts: int, like: Tensor) -> Tensor | None:
        """What the outputs of experts are multiplied by in each group, [G, 1, E or 1, 1]."""
        kept = None
        for chance, count in ((self.expert_dropout, num_experts), (self.branch_dropout, 1)):
            if chance:
                stays = (like.new_empty(groups, 1, count, 1).uniform_() >= chance) / (1 - chance)
                kept = stays if kept is None else kept * stays
        return kept


router = Spherical
