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
from transformers import PreTrainedModel

from upcycle.errors import UpcycleError
from upcycle.hf import recorded
from upcycle.hf.body import Body
from upcycle.nn.counts import counted
from upcycle.nn.moe import RouterLayer
from upcycle.nn.routing import Routing
from upcycle.records.metrics import LayerMetrics
from upcycle.training.seeds import Seeds

_KEPT = "_upcycle_output"  # attribute of a router that holds its output until `recording` ends
COLLAPSED = 0.9  # a layer counts as collapsed if its K busiest experts take a larger share of its slots


@dataclass(frozen=True, kw_only=True)
class RouterOutput:
    """The output of one router in one forward pass, for T' tokens and E experts.

    A router that is `balanced` needs no balance loss. `real` is False at rows that are padding.
    """

    logits: Tensor  # [T', E]
    counts: Tensor  # [E]
    left_behind: Tensor  # []
    top_k: int
    scores: Tensor | None = None  # [T', E], rows sum to one; None: the softmax of the logits
    real: Tensor | None = None  # [T']; None: all rows are tokens
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

    def of_tokens(self, rows: Tensor) -> Tensor:
        """Return the rows [T', ...] that are tokens and not padding; waits for the device if some are."""
        return rows if self.real is None else rows[self.real]

    def tallies(self) -> Tensor:
        """Return what is summed over the global batch, [E + 3]: counts, tokens, left behind, groups.

        A group of padding alone does not count.
        """
        counts = self.counts
        if self.real is None:
            tokens, groups = counts.new_full((), len(self.logits)), counts.new_full((), self.groups)
        else:
            tokens, groups = self.real.sum(), self.real.view(self.groups, -1).any(1).sum()
        rest = [tokens, self.left_behind, groups]
        return torch.cat([counts, torch.stack([one.to(counts.dtype) for one in rest])])


@dataclass(frozen=True, kw_only=True)
class Tally:
    """The tallies of one layer's router, summed over a batch, on the device that computed them."""

    counts: Tensor  # [E]
    tokens: Tensor | int  # []
    left_behind: Tensor | int
    groups: Tensor | int
    top_k: int
    balanced: bool


@dataclass(frozen=True, kw_only=True)
class RouterKind:
    """The facts about a layer's router that do not change from step to step."""

    experts: int
    top_k: int
    balanced: bool


def split(sums: Tensor, kinds: Sequence[RouterKind]) -> list[Tally]:
    """Split summed tallies of all layers, one vector with [E + 3] of each, by layer."""
    parts = sums.split([kind.experts + 3 for kind in kinds])
    return [
        Tally(
            counts=part[:-3],
            tokens=part[-3],
            left_behind=part[-2],
            groups=part[-1],
            top_k=kind.top_k,
            balanced=kind.balanced,
        )
        for kind, part in zip(kinds, parts, strict=True)
    ]


@dataclass(kw_only=True)
class Routers:
    """The routers of a model and their outputs in the recorded forward passes.

    They are recorded with forward hooks on `nn.moe.RouterLayer`, which returns a `Routing`, or on the class
    whose `router_logits` transformers records, which returns (logits [T, E], weights [T, K], indices [T, K]).

    A hook only leaves a router's output on the router, so that a compiled block contains it. `recording`
    reads it after the forward pass.
    """

    layers: list[int]
    stacks: list[str]
    modules: list[nn.Module]
    blocks: list[nn.Module]  # the modules that the routers are in
    names: list[str]
    outputs: list[RouterOutput] = field(default_factory=list)
    _on: bool = False
    _jitters: bool = False
    _noise: tuple[float, Seeds] | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Routers | None:
        """Return the routers that tokens reach in `model`, with hooks installed; None if there are none.

        Those of a vision tower are not among them.
        """
        body = Body.of(model)
        there = [(name, module) for name, module in recorded.routers(model) if not body.is_around(name)]
        if not there:
            return None
        routers = cls(
            layers=[_block(name, module) for name, module in there],
            stacks=[m.shape.stack if isinstance(m, RouterLayer) else "layers" for _, m in there],
            modules=[module for _, module in there],
            blocks=[model.get_submodule(name.rpartition(".")[0]) for name, _ in there],
            names=[name for name, _ in there],
        )
        for place, module in enumerate(routers.modules):
            module.register_forward_pre_hook(routers._jitter(place))
            module.register_forward_hook(routers._keep)
        return routers

    @contextmanager
    def recording(
        self, mask: Tensor | None = None, *, jitter: float = 0.0, seeds: Seeds | None = None
    ) -> Iterator[None]:
        """Record the routers' outputs inside the block.

        `mask` [B, L] is the attention mask of the forward pass, zero at padding, or None if all are tokens.
        transformers' routers do not see it; ours say themselves what is padding.

        `jitter` multiplies the routers' input by U(1 - jitter, 1 + jitter), with the seed that `seeds` has
        for the layer (Switch Transformers, section 2.2). It lasts beyond the block, because a layer may be
        recomputed in the backward pass, and acts on a router in training mode alone.
        """
        self.outputs = []
        self._on, self._jitters = True, bool(jitter)
        self._noise = (jitter, seeds) if jitter and seeds is not None else None
        try:
            yield
            real = None if mask is None else mask.flatten().bool()
            self.outputs = [
                _output(module, module.__dict__[_KEPT], real)
                for module in self.modules
                if _KEPT in module.__dict__
            ]
        finally:
            self._on = False
            for module in self.modules:
                module.__dict__.pop(_KEPT, None)

    def _jitter(self, place: int) -> Any:
        @torch.compiler.disable
        def noisy(hidden: Tensor) -> Tensor:
            assert self._noise is not None
            width, seeds = self._noise
            # Use a separate generator, so that a layer recomputed in the backward pass draws the same noise.
            generator = torch.Generator(hidden.device).manual_seed(seeds.of_layer(place))
            noise = torch.empty(hidden.shape, device=hidden.device).uniform_(
                1 - width, 1 + width, generator=generator
            )
            return hidden * noise.to(hidden.dtype)

        def hook(router: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            return (noisy(args[0]), *args[1:]) if self._jitters and router.training else None

        return hook

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._on:  # else not recording, or a layer is recomputed in the backward pass
            setattr(module, _KEPT, output)

    def tallies(self) -> Tensor:
        """Return the tallies of all layers in the recorded forward pass, one vector, ready to be summed."""
        return torch.cat([output.tallies() for output in self.outputs])

    def kinds(self) -> list[RouterKind]:
        """Return the facts about the recorded routers that `split` needs."""
        return [RouterKind(experts=len(s.counts), top_k=s.top_k, balanced=s.balanced) for s in self.outputs]

    def read(self, sums: Tensor) -> list[Tally]:
        """Split summed `tallies` by layer."""
        return split(sums, self.kinds())

    def biases(self) -> list[Tensor | None]:
        """Return the correction biases of the routers, [E] each; None for a router without one.

        They change which experts are chosen, but not the experts' weights. A router that is not trained
        counts as one without. Raises `UpcycleError` if no router has one.
        """
        found = [recorded.bias_of(*pair) for pair in zip(self.modules, self.blocks, strict=True)]
        if all(bias is None for bias in found):
            raise UpcycleError(
                "router.bias_update_rate is set, and the routers of this architecture have no correction "
                "bias; set it to 0, or take what has one (ernie4_5_moe, lfm2_moe, router.name = sigmoid)"
            )
        trained = [any(p.requires_grad for p in module.parameters()) for module in self.modules]
        return [bias if moves else None for bias, moves in zip(found, trained, strict=True)]


def _output(module: nn.Module, output: Any, real: Tensor | None) -> RouterOutput:
    """Return the output of a router in the form that all routers share.

    `real` [T'] says which rows are tokens, for routers of transformers.
    """
    if isinstance(output, Routing):
        assert isinstance(module, RouterLayer)
        return RouterOutput(
            logits=output.logits,
            scores=output.probabilities,
            real=output.real,
            counts=output.counts,
            left_behind=output.left_behind,
            top_k=module.shape.top_k,
            balanced=output.balanced,
            losses=output.losses,
            loss_coefs=module.settings.loss_coefs(),
            groups=output.groups,
        )
    raw, _, indices = output
    logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
    there = None if real is None else real[:, None].expand_as(indices)
    counts = counted(indices, logits.shape[-1], there)
    return RouterOutput(
        logits=logits, real=real, counts=counts, left_behind=counts.new_zeros(()), top_k=indices.shape[-1]
    )


@torch.no_grad()
def update_biases(biases: Sequence[Tensor | None], tallies: list[Tally], rate: float | Tensor) -> None:
    """Raise the bias of experts with less than their share and lower the others' by `rate`, [] if a tensor.

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
    path = re.escape(module.shape.module if isinstance(module, RouterLayer) else ".{i}.")
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
        left_behind=round(int(tally.left_behind) / max(1, int(tally.tokens)), 6),
    )
