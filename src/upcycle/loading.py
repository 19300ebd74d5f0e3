"""Online upcycling: a model whose parameters are read from the blueprint, each rank its own parts.

The model is built without memory and shared out. Then each part of a parameter is written where it belongs.
No MoE is ever written to disk, and no rank holds more than its shard and the block being read ("Llama 3 Meets
MoE", online upcycling).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from upcycle import targets
from upcycle.blueprints.making import blueprint
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.dtypes import BY_TORCH_NAME, FLOATS, TORCH_NAMES
from upcycle.conversion import generation_settings
from upcycle.dense.twins import refuse_two_heads
from upcycle.errors import UpcycleError
from upcycle.recipe import Recipe, RecipeLike
from upcycle.sharding import placement
from upcycle.sharding.layout import OF_TRANSFORMERS, Layout
from upcycle.sharding.placement import Part, Sharded
from upcycle.system import progress
from upcycle.tensors.entries import Entry
from upcycle.tensors.lazy import blocks

_LARGE = 100_000_000  # parameters; who trains fewer has memory to spare

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.distributed import DistributedConfig


def load(
    source: str | Path | Checkpoint,
    recipe: RecipeLike = None,
    *,
    distributed_config: DistributedConfig | dict[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    experts_implementation: str | None = None,
) -> PreTrainedModel:
    """Return the native MoE that `recipe` makes of the dense checkpoint `source`, in memory.

    `source` is a folder or a hub id. Parameters are bit-identical to those of `upcycle convert` followed
    by `from_pretrained`, and generation has the same settings. Under a `DistributedConfig` every rank
    calls this function and reads its own slices. `dtype` is a torch dtype or its name; None takes that of
    the blueprint. Raises `UpcycleError` if source, recipe and layout do not fit.
    """
    from upcycle.hf import generation

    recipe = Recipe.of(recipe)
    if recipe.moe.mtp != "drop":  # no class of transformers holds such blocks
        recipe = replace(recipe, moe=replace(recipe.moe, mtp="drop"))
    built = blueprint(source, recipe)
    try:
        refuse_two_heads(built.dense)
        model = build(
            built.target.architecture,
            built.config,
            built.target.in_memory(built.entries),
            distributed_config=distributed_config,
            dtype=dtype,
            experts_implementation=experts_implementation,
            experts=built.expert_counts,
        )
        generation.give(model, built.source.folder, generation_settings.of(built))
        return model
    finally:
        for opened in built.checkpoints:
            opened.close()


def build(
    architecture: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Entry],
    *,
    distributed_config: DistributedConfig | dict[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    experts_implementation: str | None = None,
    attn_implementation: str | None = None,
    experts: Collection[int] | None = None,
) -> PreTrainedModel:
    """Return a model of the class `architecture` with each of its parameters read from `tensors`.

    Raises `UpcycleError` if the layout does not fit. A parameter that nothing defines is a bug of ours.
    """
    from upcycle.hf import building, distributing, meshes, models, opening

    cls = models.architecture(architecture)
    shared = None if distributed_config is None else _layout(distributed_config, experts, config)
    layout = Layout() if shared is None else distributing.layout_of(shared)
    opening.refuse_unknown(experts_implementation)
    model = building.on_meta(
        cls,
        config,
        dtype=_dtype(dtype if dtype is not None else str(config.get("dtype") or "float32")),
        experts_implementation=experts_implementation,
        attn_implementation=attn_implementation,
    )
    tensors = building.split(model, tensors)
    found = building.renamed(model, tensors)
    building.untie(model, found)
    device, rank = torch.device("cpu"), 0
    cuts: dict[str, Sharded] = {}
    if shared is None or layout.world == 1:
        building.tie(model)
    else:
        meshes.start()
        device = torch.device("cpu") if shared.fsdp_cpu_offload else meshes.device()
        cuts = distributing.distribute(model, shared, meshes.meshes(layout))
        rank = torch.distributed.get_rank()
        if rank == 0:
            _warn_uneven(cuts, layout)

    filler = _filler({name: tensors[own] for name, own in found.items()}, cuts, layout, rank)
    distributing.materialize(model, filler, device)
    building.finish(model, device)
    opening.choose_experts(model, experts_implementation)
    return model


def _filler(
    entries: Mapping[str, Entry], cuts: Mapping[str, Sharded], layout: Layout, rank: int
) -> Callable[[list[str], torch.Tensor], bool]:
    """Return a function that writes this rank's part of a parameter, which has one or more names."""

    def fill(names: list[str], memory: torch.Tensor) -> bool:
        entry = next((entries[name] for name in names if name in entries), None)
        if entry is None:
            return False
        cut = next((cuts[name] for name in names if name in cuts), None)
        part = placement.whole(entry.shape) if cut is None else placement.part(cut, layout, rank)
        write_part(entry, part, memory)
        return True

    return fill


def _warn_uneven(cuts: Mapping[str, Sharded], layout: Layout) -> None:
    """Say that a rank of a large model holds much more than its share, and why."""
    share = placement.unevenness(cuts.values(), layout)
    if share > placement.SLACK and sum(each.size for each in cuts.values()) >= _LARGE:
        progress.warn(
            f"{layout}: the most loaded process holds {share:.2f} even shares of the parameters, because no "
            f"axis of the largest ones divides by the processes that share it; choose sizes of which fsdp x "
            f"tp / ep is a power of two, and let replicate take the other factors"
        )


def write_part(entry: Entry, part: Part, memory: torch.Tensor) -> None:
    """Write a part of a tensor into `memory`, which has its shape.

    Stored bytes are read to where they belong. What has to be computed, cast or moved to another device goes
    through a block of a few megabytes.
    """
    if (shape := placement.shape_of(part)) != tuple(memory.shape):
        raise AssertionError(f"a rank holds {tuple(memory.shape)} and the layout says {shape}")
    if not memory.numel():
        return
    dtype = TORCH_NAMES.get(entry.dtype, "int64")
    direct = memory.device.type == "cpu" and memory.dtype == getattr(torch, dtype) and memory.is_contiguous()
    array = as_array(memory) if direct else None
    for whole, own in placement.pieces(part):
        if array is not None:
            target = array[(*(slice(*r) for r in own), ...)]  # type: ignore[arg-type]  # a view at rank 0, too
            entry.lazy.into(whole, target, entry.dtype)
            continue
        for index in blocks(whole):
            place = tuple(
                slice(a - w + o, b - w + o) for (a, b), (w, _), (o, _) in zip(index, whole, own, strict=True)
            )
            memory[place].copy_(as_tensor(entry.lazy.read(index, entry.dtype)))


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Return an array over the memory of a contiguous tensor on the CPU; numpy's bfloat16 is not torch's."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(FLOATS["BF16"])
    return tensor.numpy()


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """Return the array as a tensor over the same memory; numpy's bfloat16 is not torch's."""
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _dtype(given: str | torch.dtype) -> torch.dtype:
    found = given if isinstance(given, torch.dtype) else getattr(torch, given, None)
    if not isinstance(found, torch.dtype) or str(found).removeprefix("torch.") not in BY_TORCH_NAME:
        raise UpcycleError(f"dtype = {given!r}; allowed: {', '.join(BY_TORCH_NAME)}")
    return found


def _layout(
    given: DistributedConfig | dict[str, Any], experts: Collection[int] | None, config: Mapping[str, Any]
) -> DistributedConfig:
    """Return the layout if it fits the world, the experts and the heads of attention.

    transformers silently ignores some layouts that do not fit.
    """
    from transformers.distributed import DistributedConfig

    from upcycle.hf import distributing

    asked = given if isinstance(given, dict) else {}
    if asked.get("enable_expert_parallel") and not asked.get("ep_size"):
        raise UpcycleError(
            "enable_expert_parallel alone does nothing; set ep_size, with fsdp_size or tp_size"
        )
    try:
        made = given if isinstance(given, DistributedConfig) else DistributedConfig(**given)
    except (TypeError, ValueError) as error:
        raise UpcycleError(f"distributed_config does not fit: {error}") from None
    if made.pp_size and made.pp_size > 1:
        raise UpcycleError(
            f"pp_size = {made.pp_size}: upcycle has no pipeline parallelism; use fsdp_size, tp_size, ep_size "
            f"and dp_replicate_size"
        )
    layout = distributing.layout_of(made)
    layout.refuse(
        int(os.environ.get("WORLD_SIZE", "1")),
        experts=experts,
        heads=attention_heads(config),
        names=OF_TRANSFORMERS,
    )
    if (target := targets.opened(config)) is not None:
        target.refuse_layout(config, tp_size=layout.tp, ep_size=layout.ep)
    return made


def attention_heads(config: Mapping[str, Any]) -> list[int]:
    """Return the numbers of attention heads in a config.json: of queries, and of keys and values."""
    text = config.get("text_config")  # of a multimodal model
    names = ("num_attention_heads", "num_key_value_heads")
    counts = [each.get(name) for each in (config, text) if isinstance(each, Mapping) for name in names]
    return [count for count in counts if type(count) is int]
