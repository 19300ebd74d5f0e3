"""Records the decisions of routers in forward passes, and computes statistics of them.

Letters: T tokens of the global batch, E experts, K experts per token, L MoE layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from upcycle.errors import UpcycleError
from upcycle.hf import recorded
from upcycle.nn.moe import Router
from upcycle.nn.routers.sigmoid import BIAS
from upcycle.nn.routing import Routing
from upcycle.records.metrics import LayerMetrics
from upcycle.training.seeds import torch_seed

COLLAPSED = 0.9  # a layer counts as collapsed if its K busiest experts take a larger share of its slots


@dataclass(frozen=True, kw_only=True)
class Said:
    """The output of one router in one forward pass, for T' tokens and E experts.

    A router that is `balanced` needs no balance loss.
    """

    logits: Tensor  # [T', E]
    counts: Tensor  # [E]
    left_behind: Tensor  # []
    top_k: int
    scores: Tensor | None = None  # [T', E], rows sum to one; None: the softmax of the logits
    balanced: bool = False
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    loss_coefs: Mapping[str, float] = field(default_factory=dict)  # coefficients of the router's own losses
    groups: int = 1

    @property
    def probabilities(self) -> Tensor:
        """The probabilities for the balance loss, [T', E].

        They are not computed in a hook, which is off when a layer is recomputed in the backward pass.
        """
        return self.logits.softmax(-1) if self.scores is None else self.scores

    def tallies(self) -> Tensor:
        """Return the numbers that are summed over the global batch: counts, tokens, left behind, groups."""
        rest = [len(self.logits), int(self.left_behind), self.groups]
        return torch.cat([self.counts, torch.tensor(rest, device=self.counts.device)])


@dataclass(frozen=True, kw_only=True)
class Tally:
    """The tallies of one layer's router, summed over a batch."""

    counts: Tensor  # [E]
    tokens: int
    left_behind: int
    groups: int
    top_k: int
    balanced: bool


@dataclass(kw_only=True)
class Routers:
    """The routers of a model and their outputs in the recorded forward passes.

    They are recorded with forward hooks on `nn.moe.Router`, which returns a `Routing`, or on the class whose
    `router_logits` transformers records, which returns (logits [T, E], weights [T, K], indices [T, K]).
    """

    layers: list[int]
    stacks: list[str]
    modules: list[nn.Module]
    names: list[str]
    said: list[Said] = field(default_factory=list)
    _on: bool = False
    _noise: tuple[float, int] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Routers | None:
        """Return the routers of `model` with hooks installed; None if it is dense."""
        own = [(name, m) for name, m in model.named_modules() if isinstance(m, Router)]
        found: list[tuple[str, nn.Module]] = [*own] or recorded.routers(model)
        if not found:
            return None
        routers = cls(
            layers=[_block(name, module) for name, module in found],
            stacks=[m.shape.stack if isinstance(m, Router) else "layers" for _, m in found],
            modules=[module for _, module in found],
            names=[name for name, _ in found],
        )
        for place, module in enumerate(routers.modules):
            module.register_forward_pre_hook(routers._jitter(place))
            module.register_forward_hook(routers._record)
        return routers

    @contextmanager
    def recording(self, *, jitter: float = 0.0, seed: int = 0) -> Iterator[None]:
        """Record the routers' outputs inside the block.

        `jitter` multiplies the routers' input by U(1 - jitter, 1 + jitter), keyed by `seed` and the layer
        (Switch Transformers, section 2.2).
        """
        self.said = []
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
            # Use a separate generator, so that a layer recomputed in the backward pass draws the same noise.
            generator = torch.Generator(hidden.device).manual_seed(torch_seed(seed * 4099 + place))
            noise = torch.empty(hidden.shape, device=hidden.device).uniform_(
                1 - width, 1 + width, generator=generator
            )
            return (hidden * noise.to(hidden.dtype), *rest)

        return hook

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._on:  # not recording, or a layer is recomputed in the backward pass
            return
        if isinstance(output, Routing):
            shared = ("logits", "counts", "left_behind", "balanced", "losses", "groups")
            assert isinstance(module, Router)
            given = {name: getattr(output, name) for name in shared}
            given |= {"top_k": module.shape.top_k, "loss_coefs": module.settings.loss_coefs()}
            self.said.append(Said(scores=output.probabilities, **given))
            return
        raw, _, indices = output
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        self.said.append(
            Said(
                logits=logits,
                counts=torch.bincount(indices.flatten(), minlength=logits.shape[-1]),
                left_behind=torch.zeros((), dtype=torch.long, device=logits.device),
                top_k=indices.shape[-1],
            )
        )

    def tallies(self) -> Tensor:
        """Return the tallies of the recorded forward pass, concatenated over layers, ready to be summed."""
        return torch.cat([said.tallies() for said in self.said])

    def read(self, sums: Tensor) -> list[Tally]:
        """Split summed `tallies` by layer."""
        out = []
        for said, part in zip(self.said, sums.split([len(s.counts) + 3 for s in self.said]), strict=True):
            tokens, left, groups = part[-3:].tolist()
            out.append(
                Tally(
                    counts=part[:-3],
                    tokens=tokens,
                    left_behind=left,
                    groups=groups,
                    top_k=said.top_k,
                    balanced=said.balanced,
                )
            )
        return out

    def biases(self) -> list[Tensor | None]:
        """Return the correction biases of the routers, [E] each; None for a router without one.

        They change which experts are chosen, but not the experts' weights. Raises `UpcycleError` if no router
        has one.
        """
        found = [
            next((p.detach() for name, p in _tensors(module) if name.endswith(BIAS)), None)
            for module in self.modules
        ]
        if all(bias is None for bias in found):
            raise UpcycleError(
                "router.bias_update_rate is set, and the routers of this architecture have no correction "
                "bias; set it to 0, or take what has one (ernie4_5_moe, router.name = sigmoid)"
            )
        return found


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


@torch.no_grad()
def update_biases(biases: Sequence[Tensor | None], tallies: list[Tally], rate: float) -> None:
    """Raise the bias of experts with less than their share and lower the others' by `rate`.

    Source: Wang et al. 2024, Auxiliary-Loss-Free Load Balancing, algorithm 1.
    """
    for bias, tally in zip(biases, tallies, strict=True):
        if bias is None:
            continue
        load = tally.counts.float()
        step = (rate * torch.sign(load.mean() - load)).view(bias.shape).to(bias.dtype)
        if isinstance(bias, DTensor):
            step = distribute_tensor(step, bias.device_mesh, bias.placements)
        bias += step


def _block(name: str, module: nn.Module) -> int:
    """Return the number of a router's block in its stack."""
    path = re.escape(module.shape.module if isinstance(module, Router) else ".{i}.")
    found = re.search(path.replace(r"\{i\}", r"(\d+)"), name)
    assert found is not None
    return int(found.group(1))


def health(tally: Tally, stack: str, layer: int) -> LayerMetrics:
    """Return the metrics of layer number `layer` of a stack for one step."""
    counts = tally.counts.double()
    load = counts / counts.sum()
    entropy = torch.special.entr(load).sum() / math.log(max(2, len(load)))
    busiest = load.topk(min(tally.top_k, len(load))).values.sum()
    return LayerMetrics(
        layer=layer,
        stack=stack,
        load=tuple(round(x, 6) for x in load.tolist()),
        entropy=round(float(entropy), 6),
        busiest=round(float(load.max()), 6),
        idlest=round(float(load.min()), 6),
        dead=int((load == 0).sum()),
        collapsed=bool(busiest > COLLAPSED) and len(load) > tally.top_k and not tally.balanced,
        left_behind=round(tally.left_behind / max(1, tally.tokens), 6),
    )
