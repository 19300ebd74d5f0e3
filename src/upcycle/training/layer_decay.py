"""Layer-wise learning rate decay: blocks near the input learn more slowly than those near the head.

Layers are numbered as in BEiT, timm and mmpretrain (`Trained.depth`): of N blocks, the embeddings are 0,
block i (from 0) is i + 1, and everything after the blocks is N + 1. Number n has the schedule's rate times
decay^(N + 1 - n). The parts of an MoE layer (experts, router, shared experts) and the norm that only it reads
have the full rate (MoE Jetpack's code, NeurIPS 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from upcycle.families import Config, Family
from upcycle.families._training import trained
from upcycle.training import moe_layers


def scales(
    model: PreTrainedModel, family: Family, config: Config, decay: float, routers: Sequence[str] = ()
) -> dict[str, float]:
    """Return the factor on the learning rate of every parameter, by name.

    `routers` are the names of the model's routers.
    """
    base = moe_layers.base_of(model)
    known = trained(family, f"train.layer_decay = {decay}")
    stacks = known.stacks(config)
    counts = {s.blocks: len(list(model.base_model.get_submodule(s.blocks).children())) for s in stacks}
    last = sum(counts.values()) + 1
    layers = moe_layers.layers(routers)
    norms = tuple(
        f"{base}{norm}."
        for stack in stacks
        if (own := known.own_norm(config, stack))
        for norm in (own.format(i=i) for i in range(counts[stack.blocks]))
        if any(layer.startswith(f"{base}{norm.rpartition('.')[0]}.") for layer in layers)
    )
    return {
        name: 1.0
        if name.startswith((*layers, *norms)) or not name.startswith(base)
        else decay ** (last - known.depth(name.removeprefix(base), counts))
        for name, _ in model.named_parameters()
    }
