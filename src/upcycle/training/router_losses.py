"""The losses on routers: what each of them is, how layers are put together, and what a run weighs them by.

A loss is a mean over the global batch, computed in parts that add up. Letters: T tokens of the global batch,
T' tokens at hand, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upcycle.nn.balance import Balance
from upcycle.training.routing import Said, Tally


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one micro batch contributes to the losses on routers, [] each.

    `total` is what the task's loss goes up by; the others are not weighed. `own` are the losses that routers
    bring themselves, by name.
    """

    total: Tensor
    balance: Tensor
    z: Tensor
    own: Mapping[str, Tensor]

    def values(self) -> list[Tensor]:
        """All but the total, without their graphs: balance, z, and the own ones in their order."""
        return [loss.detach() for loss in (self.balance, self.z, *self.own.values())]


def own_names(said: Sequence[Said]) -> list[str]:
    """The losses that the routers bring themselves, in the order of their names."""
    return sorted({name for one in said for name in one.loss_coefs})


def part(
    said: Sequence[Said], tallies: Sequence[Tally], settings: Balance, *, share: float, parts: int
) -> Part:
    """The losses of one micro batch from what every layer's router said in it.

    `tallies` are of the part `share` of the global batch; buffered (Qiu et al. 2025), they stand for it all.
    `parts` is the number of micro batches on all ranks. Layers without a loss of a kind count as zero in a
    mean over layers, as in t5x.
    """
    zero = said[0].logits.new_zeros(())
    own = own_names(said)
    each: dict[str, list[Tensor]] = {name: [] for name in ("balance", "z", *settings.coefficients, *own)}
    for one, tally in zip(said, tallies, strict=True):
        tokens = tally.tokens / share
        balance = load_balancing_loss(one.probabilities, tally.counts / share, tokens)
        each["balance"].append(zero if one.balanced else balance)
        each["z"].append(z_loss(one.logits, tokens))
        for name in (*settings.coefficients, *own):
            each[name].append(one.losses[name] / (tally.groups / share) if name in one.losses else zero)
    losses = {name: _together(layers, settings) for name, layers in each.items()}
    if settings.balance_loss == "pooled":
        losses["balance"] = pooled_loss([one.logits for one in said], said[0].top_k) / parts
    coefficients = {
        "balance": settings.balance_loss_coef,
        "z": settings.z_loss_coef,
        **settings.coefficients,
    }
    # A loss that is not asked for may not be finite where it is not used, and 0 x inf is not 0.
    asked = [factor * losses[name] for name, factor in coefficients.items() if factor]
    asked += [_weighed(name, said, each[name], settings) for name in own]
    return Part(
        total=sum(asked, zero),
        balance=losses["balance"],
        z=losses["z"],
        own={name: losses[name] for name in own},
    )


def _together(layers: Sequence[Tensor], settings: Balance) -> Tensor:
    """The losses of all layers as one."""
    return torch.stack([*layers]).mean() if settings.layers == "mean" else torch.stack([*layers]).sum()


def _weighed(name: str, said: Sequence[Said], layers: Sequence[Tensor], settings: Balance) -> Tensor:
    """A loss of the routers' own, each layer's by the coefficient of its router."""
    factors = [one.loss_coefs.get(name, 0.0) for one in said]
    zero = torch.zeros_like(layers[0])
    return _together([f * loss if f else zero for f, loss in zip(factors, layers, strict=True)], settings)


def load_balancing_loss(probabilities: Tensor, counts: Tensor, tokens: float) -> Tensor:
    """The load-balancing loss of one layer over the global batch, [].

    `probabilities` are those of the tokens at hand, [T', E]; `counts` [E] and `tokens` are of the whole
    global batch. E * sum_e f_e P_e with f_e the tokens that chose e over T, P_e the sum of e's probability
    over the tokens at hand over T (Switch Transformers, eq. 4-6): summed over all parts of the batch it is K
    at perfect balance, E / K times that where all tokens choose the same K experts for sure. Gradients flow
    through P alone, so parts add up to the gradient of the whole.
    """
    share = counts.to(probabilities.dtype) / tokens
    return probabilities.shape[-1] * (share * probabilities.sum(0)).sum() / tokens


def pooled_loss(logits: list[Tensor], top_k: int) -> Tensor:
    """transformers' own loss, which pools the tokens of all layers before it multiplies: blind to the
    collapse of each layer, kept to reproduce what was trained with it. K at what it takes for balance."""
    from upcycle.hf.mixtral_loss import load_balancing_loss_func

    loss: Tensor = load_balancing_loss_func(tuple(logits), logits[0].shape[-1], top_k)
    return loss


def z_loss(logits: Tensor, tokens: float) -> Tensor:
    """The squared log-sum-exp of the logits [T', E] of one layer over the global batch's tokens (ST-MoE,
    eq. 5), of the tokens at hand."""
    return logits.logsumexp(-1).square().sum() / tokens
