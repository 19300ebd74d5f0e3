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

KEY_STD = 0.02  # initial std of the key projection, the same as for a ViT's matrices in transformers
NORM_EPS = 1e-5  # epsilon of the queries' LayerNorm

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "init": "normal",
        "std": 0.02,
        "keys": "projected",
        "key_norm": False,
        "query_norm": "inherited",
        "temperatures": 1,
        # The paper says "a large value". Initial keys give products of deviation 0.02 sqrt(H), 0.28 in a
        # ViT-T, so that at 1 a slot starts as a mean over nearly all tokens.
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
    """Each expert has `slots` queries, the rows of the weight, normalised onto a sphere.

    A LayerNorm and a division by their length do that. The queries' products with the tokens' keys are
    divided by a learned temperature. A softmax over tokens makes slots from them, and a second function makes
    each token's weights for all slots (Algorithm 1).

    `preset` sets all keys that are not given: `paper` follows MoE Jetpack's text, `repo` its released code.
    `keys` are a linear map of the tokens (`projected`) or the tokens (`plain`); `key_norm` gives them length
    one. The LayerNorm of `query_norm` starts as the one of the dense block before the network (`inherited`)
    or as the identity (`fresh`). `temperatures` is one for both directions or one each, starting at
    `temperature`. `combine` makes the weights for slots. `noise` scales the N(0, 1) added to the products, by
    default 1 / E; it is added after the division by temperature with `noise_after`, and only in training
    without `noise_in_eval`.

    In training, `expert_dropout` is the probability that an expert's outputs are dropped in a group, and
    `branch_dropout` that all outputs of a group are; the rest is scaled up accordingly. (In the released code
    that rate grows with depth, to 0.1.)
    """

    summary = "experts see mixtures of tokens, chosen on a sphere (SpheroMoE)"

    # sets what is not given: MoE Jetpack's text (paper) or its released code (repo)
    preset: Literal["paper", "repo"] = "paper"
    # how the queries start, as the weight of other routers does
    init: str | None = None  # type: ignore[assignment]
    # standard deviation of the queries
    std: Annotated[float, AtLeast(0)] | None = None  # type: ignore[assignment]
    # the keys are a linear map of the tokens (projected), or the tokens (plain)
    keys: Literal["projected", "plain"] | None = None
    key_norm: bool | None = None  # whether keys are normalised to length one
    # whether the queries' LayerNorm starts as that of the block before the network, or as the identity
    query_norm: Literal["inherited", "fresh"] | None = None
    temperatures: Annotated[int, Within("[1, 2]")] | None = None  # one for both directions, or one each
    temperature: Annotated[float, Above(0)] | None = None  # the initial temperature
    combine: Literal["softmax", "entmax15"] | None = None  # the function that makes weights for slots
    noise: Annotated[float, AtLeast(0)] | None = None  # factor of N(0, 1) on the products; none: 1 / E
    noise_after: bool | None = None  # whether noise comes after the division by temperature
    noise_in_eval: bool | None = None  # whether there is noise outside training
    # probability that an expert's outputs are dropped in a group in training
    expert_dropout: Annotated[float, Within("[0, 1)")] = 0.0
    branch_dropout: Annotated[float, Within("[0, 1)")] = 0.0  # probability of dropping all outputs of a group

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
        # Use torch's own generator: its state is restored when a layer is recomputed.
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
        """Return the factors for the experts' outputs in each group, [G, 1, E or 1, 1]."""
        kept = None
        for chance, count in ((self.expert_dropout, num_experts), (self.branch_dropout, 1)):
            if chance:
                stays = (like.new_empty(groups, 1, count, 1).uniform_() >= chance) / (1 - chance)
                kept = stays if kept is None else kept * stays
        return kept


router = Spherical
