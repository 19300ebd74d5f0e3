"""Token choice: each token takes its K best-scored experts (Shazeer 2017; V-MoE; Switch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from upcycle.errors import UpcycleError
from upcycle.nn.routers import Rounding, Router, places
from upcycle.settings import Above, AtLeast

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.nn.dispatch import Dispatch
    from upcycle.nn.routing import Routing, Tokens


_LEAST_VARIANCE = 1e-20  # of a token's logits, so that equal ones are not divided by zero


@dataclass(frozen=True, kw_only=True)
class TopK(Router):
    """Softmax over experts; each token takes the K largest.

    `normalize` makes the K weights sum to one, which equals a softmax over the K logits (top-k then softmax);
    without it they stay as the softmax gave them.

    With a `capacity_factor` C, an expert takes at most its share of a group of S tokens, rounded as in
    `capacity`: S K C / E (`vmoe`, `exact`) or S C / E (`flaxformer`, whose share has no K). None takes all
    tokens. First choices come before second ones. Within each, the earlier token comes first or, with
    `batch_priority`, the token with the higher score (Riquelme et al. 2021). In a causal stack, a token's
    choices come before those of all later tokens: otherwise a later token could take its place.

    `logit_normalization` L makes the logits z of a token L (z - mean z) / std z before the softmax, so that
    the weights of all tokens are as sharp as each other (Skywork-MoE, arXiv 2406.06563). MoE classes of
    transformers cannot do so.

    `noise_std` adds N(0, (noise_std / E)^2) to the logits in training (V-MoE).
    """

    shares_one = True
    summary = "each token takes its K best experts"
    needs = "nothing; its own keys moe.target = upcycled"

    # places of an expert, relative to its fair share; none, or num_experts: capacity for all tokens
    capacity_factor: Annotated[float, Above(0)] | None = None
    # how those places are rounded: as in the code of V-MoE or Flaxformer, or to the nearest (exact)
    rounding: Rounding = "exact"
    # the standard deviation that a token's logits over the experts are given; None: as they are
    logit_normalization: Annotated[float, Above(0)] | None = None
    batch_priority: bool = False  # whether the surer token gets a place first, not the earlier one
    # noise on the logits in training, divided by the number of experts (V-MoE)
    noise_std: Annotated[float, AtLeast(0)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_priority and self.capacity_factor is None:
            raise UpcycleError(
                "router.batch_priority orders tokens for places that are short; set router.capacity_factor"
            )

        if self.logit_normalization is not None and self.init == "zeros":
            raise UpcycleError(
                "router.init = zeros scores all experts alike, and router.logit_normalization divides by how "
                "unlike scores are; take another init"
            )
        if self.logit_normalization is not None and self.rescale and not self.normalize:
            raise UpcycleError(
                "router.rescale scales experts by what weights sum to if all experts score alike, and with "
                "router.logit_normalization they never do; set router.rescale = false, or normalize = true"
            )

    @property
    def causal(self) -> bool:
        return not self.batch_priority

    def gate_sum(self, num_experts: int, top_k: int) -> float:
        return 1.0 if self.normalize else top_k / num_experts

    def sums_to_one(self, num_experts: int, top_k: int) -> bool:
        return self.normalize or top_k == num_experts

    def reaches_all(self, num_experts: int, top_k: int) -> bool:
        share = self.share(num_experts, top_k)
        return share is None or share >= 1

    def experts_per_token(self, num_experts: int, top_k: int, length: int) -> float:
        share = self.share(num_experts, top_k)
        return float(top_k) if share is None else min(float(top_k), num_experts * share)

    def share(self, num_experts: int, top_k: int) -> float | None:
        if self.capacity_factor is None:
            return None
        chosen = 1 if self.rounding == "flaxformer" else top_k
        return chosen * self.capacity_factor / num_experts

    def losses_of_run(self) -> tuple[str, ...]:
        return ("importance", "load") if self.noise_std else ("importance",)

    def route(self, tokens: Tokens) -> Routing:
        import torch

        from upcycle.nn.routing import Routing

        clean = torch.nn.functional.linear(tokens.hidden, tokens.tensors["weight"])
        if self.logit_normalization is not None:
            centred = torch.nn.functional.layer_norm(clean, (tokens.num_experts,), eps=_LEAST_VARIANCE)
            clean = self.logit_normalization * centred
        logits = clean
        noise = self.noise_std / tokens.num_experts if tokens.training else 0.0
        if noise:
            logits = clean + noise * torch.randn_like(clean)
        probabilities = logits.softmax(-1)
        weights, index = probabilities.topk(tokens.top_k, dim=-1)  # [G, N, K]
        losses = {"importance": _importance(clean.softmax(-1), tokens.real)}
        if noise:
            losses["load"] = _load(clean, logits, tokens.top_k, noise, tokens.real)
        counts = tokens.counts_of(index)
        dispatch, left = self._dispatch(tokens, weights, index)
        return Routing(
            dispatch=dispatch,
            logits=logits.flatten(0, 1),
            probabilities=probabilities.flatten(0, 1),
            real=tokens.real_rows,
            counts=counts,
            left_behind=counts.new_zeros(()) if left is None else left,
            losses=losses,
            groups=tokens.groups,
        )

    def _dispatch(self, tokens: Tokens, weights: Tensor, index: Tensor) -> tuple[Dispatch, Tensor | None]:
        """Return where tokens go, for choices [G, N, K], and how many are left behind; None if never any."""
        import torch

        from upcycle.nn.dispatch import Choices, Rows

        sureness = weights[..., 0]  # before normalisation, which makes a single weight one
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if (share := self.share(tokens.num_experts, tokens.top_k)) is None:
            weights, index = weights.flatten(0, 1), index.flatten(0, 1)
            return Choices(index=index, weights=weights, length=tokens.length), None
        kept = _keep(
            index,
            sureness if self.batch_priority else None,
            tokens.real,
            tokens.num_experts,
            places(tokens.length, tokens.padding, share, self.rounding),
            causal=tokens.causal,
        )
        if self.normalize:  # after routing: a choice without a place leaves its weight to the others
            sums = (weights * kept).sum(-1, keepdim=True)
            weights = weights / sums.masked_fill(sums == 0, 1.0)
        # A choice without a place has no expert. Taking it out would need to know how many there are.
        token = torch.arange(tokens.groups * tokens.length, device=index.device)
        rows = Rows(
            tokens=token.repeat_interleave(tokens.top_k),
            experts=index.where(kept, tokens.num_experts).flatten(),
            weights=(weights * kept).flatten(),
            length=tokens.length,
            some_left=True,
        )
        return rows, tokens.number_of(~kept.any(-1))


def _keep(
    index: Tensor,
    sureness: Tensor | None,
    real: Tensor | None,
    num_experts: int,
    room: int | Tensor,
    *,
    causal: bool,
) -> Tensor:
    """Return which choices [G, N, K] find a place in their expert's buffer, surest tokens first if asked."""
    import torch

    groups, length, top_k = index.shape
    order = torch.arange(length, device=index.device).expand(groups, length)
    if sureness is not None:
        order = sureness.argsort(dim=1, descending=True, stable=True)
    queue = index.gather(1, order[..., None].expand_as(index))
    there = torch.ones_like(order, dtype=torch.bool) if real is None else real.gather(1, order)
    hot = torch.nn.functional.one_hot(queue, num_experts) * there[..., None, None]  # [G, N, K, E]
    if causal:  # token by token, each with its choices in order
        line = hot.flatten(1, 2)
        before = (line.cumsum(1) - line).view_as(hot)
    else:  # all first choices, then all second ones
        line = hot.transpose(1, 2).flatten(1, 2)
        before = (line.cumsum(1) - line).view(groups, top_k, length, num_experts).transpose(1, 2)
    place = (before * hot).sum(-1)
    fits = (place < (room if isinstance(room, int) else room[:, None, None])) & there[..., None]
    return torch.zeros_like(fits).scatter(1, order[..., None].expand_as(fits), fits)


def _importance(probabilities: Tensor, real: Tensor | None) -> Tensor:
    """Return the squared coefficient of variation of the experts' summed weights, summed over groups.

    Source: V-MoE, equation 7.
    """
    if real is not None:
        probabilities = probabilities * real[..., None]
    return _variation(probabilities.sum(1)).sum()


def _load(clean: Tensor, noisy: Tensor, top_k: int, noise: float, real: Tensor | None) -> Tensor:
    """Return the same loss on the load: each expert's probability to score above the K-th under new noise.

    Source: V-MoE, appendix A.2.
    """
    import torch

    threshold = noisy.topk(top_k, dim=-1).values[..., -1:]
    chance = torch.special.ndtr((clean - threshold) / noise)
    if real is not None:
        chance = chance * real[..., None]
    return _variation(chance.mean(1)).sum()


def _variation(shares: Tensor) -> Tensor:
    """Return the squared coefficient of variation of shares [G, E], [G]; 0 for a group of padding alone."""
    shares = shares.masked_fill((shares == 0).all(-1, keepdim=True), 1.0)  # else 0 / 0, also in the gradient
    return (shares.std(-1, unbiased=False) / shares.mean(-1)).square()


router = TopK
