"""Layer-wise learning rate decay: blocks near the input learn more slowly than those near the head.

Layers are numbered as in BEiT, timm and mmpretrain (`Trained.depth`): of N blocks, the embeddings are 0,
block i (from 0) is i + 1, and everything after the blocks is N + 1. What a multimodal model has around its
text model is 0 as well. Number n has the schedule's rate times decay^(N + 1 - n). The parts of an MoE layer
(experts, router, shared experts) and the norm that only it reads have the full rate (MoE Jetpack's code,
NeurIPS 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from upcycle.families import Config, Family
from upcycle.families._training import trained
from upcycle.hf.body import Body
from upcycle.training import moe_layers


def scales(
    model: PreTrainedModel, family: Family, config: Config, decay: float, routers: Sequence[str] = ()
) -> dict[str, float]:
    """Return the factor on the learning rate of every parameter, by name.

    `routers` are the names of the model's routers.
    """
    known = trained(family, f"train.layer_decay = {decay}")
    body = Body.of(model)
    base = body.prefix
    stacks = known.stacks(config)
    counts = {s.blocks: len(body.blocks(s.blocks)) for s in stacks}
    last = sum(counts.values()) + 1
    layers = moe_layers.layers(routers)
    norms = tuple(
        f"{base}{norm}."
        for stack in stacks
        if (own := known.own_norm(config, stack))
        for norm in (own.format(i=i) for i in range(counts[stack.blocks]))
        if any(layer.startswith(f"{base}{norm.rpartition('.')[0]}.") for layer in layers)
    )

    def scale(name: str) -> float:
        if name.startswith((*layers, *norms)) or body.follows(name):
            return 1.0
        depth = 0 if body.is_around(name) else known.depth(name.removeprefix(base), counts)
        return float(decay ** (last - depth))

    return {name: scale(name) for name, _ in model.named_parameters()}
