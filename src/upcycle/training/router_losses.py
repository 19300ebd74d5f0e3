"""The router losses: their formulas, how layers are combined, and their weights in a run.

A loss is a mean over the global batch, computed in parts that add up. Letters: T tokens of the global batch,
T' tokens of this part, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upcycle.nn.balance import Balance
from upcycle.training.routing import RouterOutput, Tally


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """The contribution of one micro batch to the router losses, [] each.

    `total` is weighted and added to the task's loss; the others are not weighted. `own` are the routers' own
    losses, by name.
    """

    total: Tensor
    balance: Tensor
    z: Tensor
    own: Mapping[str, Tensor]

    def values(self) -> list[Tensor]:
        """Return all losses but the total, detached, [] each: balance, z, the routers' own in their order."""
        return [loss.detach() for loss in (self.balance, self.z, *self.own.values())]


def own_names(outputs: Sequence[RouterOutput]) -> list[str]:
    """Return the names of the routers' own losses, sorted."""
    return sorted({name for one in outputs for name in one.loss_coefs})


def contribution(
    outputs: Sequence[RouterOutput], tallies: Sequence[Tally], settings: Balance, *, share: float, parts: int
) -> Contribution:
    """Compute the losses of one micro batch from the recorded outputs of every layer's router.

    `tallies` cover the fraction `share` of the rows of the global batch; in buffered mode (Qiu et al. 2025)
    they are scaled up to all of it, which is only about right if rows have padding. `parts` is the number of
    micro batches on all ranks. In a mean over layers, layers without a loss count as zero, as in t5x.
    """
    zero = outputs[0].logits.new_zeros(())
    own = own_names(outputs)
    each: dict[str, list[Tensor]] = {name: [] for name in ("balance", "z", *settings.coefficients, *own)}
    for one, tally in zip(outputs, tallies, strict=True):
        tokens = _scaled(tally.tokens, share, one.logits)
        groups = _scaled(tally.groups, share, one.logits)
        balance = load_balancing_loss(_real(one, one.probabilities), tally.counts / share, tokens)
        each["balance"].append(zero if one.balanced else balance)
        each["z"].append(z_loss(one.logits, tokens, one.real))
        for name in (*settings.coefficients, *own):
            each[name].append(one.losses[name] / groups if name in one.losses else zero)
    losses = {name: _together(layers, settings) for name, layers in each.items()}
    if settings.balance_loss == "pooled":
        logits = [one.of_tokens(one.logits) for one in outputs]
        losses["balance"] = pooled_loss(logits, outputs[0].top_k) / parts
    coefficients = {
        "balance": settings.balance_loss_coef,
        "z": settings.z_loss_coef,
        **settings.coefficients,
    }
    # Skip losses with factor 0: an unused loss may be infinite, and 0 x inf is not 0.
    asked = [factor * losses[name] for name, factor in coefficients.items() if factor]
    asked += [_weighed(name, outputs, each[name], settings) for name in own]
    return Contribution(
        total=sum(asked, zero),
        balance=losses["balance"],
        z=losses["z"],
        own={name: losses[name] for name in own},
    )


def _scaled(number: Tensor | int, share: float, like: Tensor) -> Tensor | float:
    """Return a number of part of the batch scaled up to all of it, in the type of `like`."""
    return (number.double() / share).to(like.dtype) if isinstance(number, Tensor) else number / share


def _real(one: RouterOutput, rows: Tensor) -> Tensor:
    """Return rows [T', E] with zeros where they are padding."""
    return rows if one.real is None else rows * one.real[:, None]


def _together(layers: Sequence[Tensor], settings: Balance) -> Tensor:
    """Combine the losses of all layers."""
    return torch.stack([*layers]).mean() if settings.layers == "mean" else torch.stack([*layers]).sum()


def _weighed(
    name: str, outputs: Sequence[RouterOutput], layers: Sequence[Tensor], settings: Balance
) -> Tensor:
    """Combine one of the routers' own losses, with each layer weighted by its router's coefficient."""
    factors = [one.loss_coefs.get(name, 0.0) for one in outputs]
    zero = torch.zeros_like(layers[0])
    return _together([f * loss if f else zero for f, loss in zip(factors, layers, strict=True)], settings)


def load_balancing_loss(probabilities: Tensor, counts: Tensor, tokens: float | Tensor) -> Tensor:
    """Compute the load-balancing loss of one layer over the global batch, [].

    `probabilities` [T', E] are those of the tokens of this part; `counts` [E] and `tokens` are of the global
    batch. The loss is E * sum_e f_e P_e, where f_e is the fraction of tokens that chose e, and P_e is e's
    probability summed over this part, divided by T (Switch Transformers, equations 4 to 6). Summed over all
    parts it is K at perfect balance, and E / K times that if all tokens choose the same K experts with
    certainty. Gradients flow through P alone, so that those of the parts add up to that of the whole.
    """
    share = counts.to(probabilities.dtype) / tokens
    return probabilities.shape[-1] * (share * probabilities.sum(0)).sum() / tokens


def pooled_loss(logits: list[Tensor], top_k: int) -> Tensor:
    """Compute transformers' own loss for logits [T', E] of each layer, whose tokens it pools first.

    It does not see the collapse of a single layer, and is kept to reproduce models trained with it. It is K
    at what it considers perfect balance.
    """
    from upcycle.hf.mixtral_loss import load_balancing_loss_func

    loss: Tensor = load_balancing_loss_func(tuple(logits), logits[0].shape[-1], top_k)
    return loss


def z_loss(logits: Tensor, tokens: float | Tensor, real: Tensor | None = None) -> Tensor:
    """Compute the z-loss of one layer for this part: squared log-sum-exp of logits [T', E], over `tokens`.

    `tokens` is the number of tokens of the global batch, and `real` [T'] is False at padding. Source: ST-MoE,
    equation 5.
    """
    squares = logits.logsumexp(-1).square()
    return (squares if real is None else squares * real).sum() / tokens
