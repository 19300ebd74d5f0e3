"""What routers did in a forward pass, the losses that balance them, and the statistics of it.

Letters: T tokens of the global batch, E experts, K experts a token, L MoE layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from upcycle.errors import UpcycleError

COLLAPSED = 0.9  # share of a layer's slots in its K busiest experts


@dataclass(kw_only=True)
class Routers:
    """The routers of a model, and what they said in the forward passes that are recorded.

    Works through forward hooks on the class that transformers records `router_logits` of: it gives
    (logits [T, E], weights [T, K], indices [T, K]) in every architecture here.
    """

    layers: list[int]
    modules: list[nn.Module]
    names: list[str]
    num_experts: int
    top_k: int
    logits: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    _on: bool = False
    _noise: tuple[float, int] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Routers | None:
        """The routers of `model`, with hooks in place; None where it is dense."""
        recorded = next(
            (
                recorders["router_logits"]
                for module in model.modules()
                if (recorders := getattr(module, "_can_record_outputs", None))
                and "router_logits" in recorders
            ),
            None,
        )
        if recorded is None:
            return None
        found = [(n, m) for n, m in model.named_modules() if isinstance(m, recorded.target_class)]
        routers = cls(
            layers=[int(re.search(r"layers\.(\d+)\.", name).group(1)) for name, _ in found],  # type: ignore[union-attr]
            modules=[module for _, module in found],
            names=[name for name, _ in found],
            num_experts=0,
            top_k=0,
        )
        for place, module in enumerate(routers.modules):
            module.register_forward_pre_hook(routers._jitter(place))
            module.register_forward_hook(routers._record)
        return routers

    @contextmanager
    def recording(self, *, jitter: float = 0.0, seed: int = 0) -> Iterator[None]:
        """Keep what the routers say. `jitter` multiplies their input by U(1 - jitter, 1 + jitter), keyed by
        `seed` and the layer (Switch Transformers, 2.2)."""
        self.logits, self.indices = [], []
        self._on, self._noise = True, (jitter, seed) if jitter else None
        try:
            yield
        finally:
            self._on = False

    def _jitter(self, place: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._noise is None:
                return None
            hidden, *rest = args
            width, seed = self._noise
            # A generator of its own: recomputing the layer in the backward pass draws the same noise.
            generator = torch.Generator(hidden.device).manual_seed(seed * 4099 + place)
            noise = torch.empty(hidden.shape, device=hidden.device).uniform_(
                1 - width, 1 + width, generator=generator
            )
            return (hidden * noise.to(hidden.dtype), *rest)

        return hook

    def _record(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if not self._on:  # not asked for, or a layer recomputed in the backward pass
            return
        logits, _, indices = output
        self.logits.append(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        self.indices.append(indices)
        self.num_experts, self.top_k = logits.shape[-1], indices.shape[-1]

    def counts(self) -> Tensor:
        """How many of the recorded tokens chose each expert, [L, E]."""
        return torch.stack([torch.bincount(i.flatten(), minlength=self.num_experts) for i in self.indices])

    def biases(self) -> list[Tensor]:
        """The correction biases that choose experts and do not weigh them, [E] each."""
        found = [
            p.detach()
            for module in self.modules
            for name, p in [*module.named_parameters(), *module.named_buffers()]
            if name.endswith("e_score_correction_bias")
        ]
        if len(found) != len(self.modules):
            raise UpcycleError(
                "router.bias_update_rate is set, and the routers of this architecture have no correction "
                "bias; set it to 0, or take a target that has one (ernie4_5_moe)"
            )
        return found


def load_balancing_loss(logits: list[Tensor], counts: Tensor, tokens: int) -> Tensor:
    """The load-balancing loss of each layer over the global batch, [L]; their mean is what is trained on.

    `logits` are those of the tokens at hand, [T', E] a layer; `counts` [L, E] and `tokens` are of the whole
    global batch. E * sum_e f_e P_e with f_e the tokens that chose e over T, P_e the sum of e's softmax
    probability over the tokens at hand over T (Switch Transformers, eq. 4-6): summed over all parts of the
    batch it is K at perfect balance, E / K times that where all tokens choose the same K experts for sure.
    Gradients flow through P alone, so parts add up to the gradient of the whole.
    """
    share = counts.to(logits[0].dtype) / tokens
    mean = torch.stack([layer.softmax(-1).sum(0) for layer in logits]) / tokens
    return logits[0].shape[-1] * (share * mean).sum(-1)


def pooled_loss(logits: list[Tensor], top_k: int) -> Tensor:
    """transformers' own loss, which pools the tokens of all layers before it multiplies: blind to the
    collapse of each layer, kept to reproduce what was trained with it. K at what it takes for balance."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss: Tensor = load_balancing_loss_func(tuple(logits), logits[0].shape[-1], top_k)
    return loss


def z_loss(logits: list[Tensor], tokens: int) -> Tensor:
    """The mean squared log-sum-exp of the logits, mean over layers (ST-MoE, eq. 5), of the tokens at hand."""
    return torch.stack([layer.logsumexp(-1).square().sum() for layer in logits]).mean() / tokens


@torch.no_grad()
def update_biases(biases: list[Tensor], counts: Tensor, rate: float) -> None:
    """Raise the bias of experts that got less than their share, lower that of the others, by `rate`
    (Wang et al. 2024, Auxiliary-Loss-Free Load Balancing, algorithm 1)."""
    load = counts.float()
    steps = rate * torch.sign(load.mean(-1, keepdim=True) - load)
    for bias, step in zip(biases, steps, strict=True):
        bias += step.view_as(bias).to(bias.dtype)


def health(counts: Tensor, top_k: int) -> list[dict[str, Any]]:
    """What became of each layer, from its counts [L, E].

    `load` is each expert's share of the slots, `entropy` that of the load over log E (1: even),
    `dead` the experts that got nothing, `collapsed` whether the K busiest got nearly everything.
    """
    load = counts.double() / counts.sum(-1, keepdim=True)
    entropy = torch.special.entr(load).sum(-1) / torch.log(torch.tensor(float(max(2, load.shape[-1]))))
    busiest = load.topk(min(top_k, load.shape[-1])).values.sum(-1)
    return [
        {
            "load": [round(x, 6) for x in row.tolist()],
            "entropy": round(float(even), 6),
            "busiest": round(float(row.max()), 6),
            "idlest": round(float(row.min()), 6),
            "dead": int((row == 0).sum()),
            "collapsed": bool(most > COLLAPSED) and load.shape[-1] > top_k,
        }
        for row, even, most in zip(load, entropy, busiest, strict=True)
    ]
