"""Online upcycling: transformers gets the blueprint as a state dict whose tensors are read on demand.

Each rank asks the blueprint for the slices that it holds. No MoE is ever written to disk, and no rank holds
more than its shard and the tensor being read ("Llama 3 Meets MoE", online upcycling).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from upcycle import targets
from upcycle.blueprints.blueprint import blueprint
from upcycle.blueprints.entries import Entry
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.dtypes import TORCH_NAMES
from upcycle.dense.source import refuse_two_heads
from upcycle.errors import UpcycleError
from upcycle.recipe import RecipeLike

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.distributed import DistributedConfig

    from upcycle.hf.filling import Slices


def load(
    source: str | Path | Checkpoint,
    recipe: RecipeLike = None,
    *,
    distributed_config: DistributedConfig | dict[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    experts_implementation: str | None = None,
) -> PreTrainedModel:
    """Return the native MoE that `recipe` makes of the dense checkpoint `source`, in memory.

    `source` is a folder or a hub id. Parameters are bit-identical to those of `upcycle convert` followed by
    `from_pretrained`. Under a `DistributedConfig` every rank calls this function and reads its own slices.
    `dtype` is a torch dtype or its name; None takes that of the blueprint. Raises `UpcycleError` if source,
    recipe and layout do not fit.
    """
    built = blueprint(source, recipe)
    try:
        refuse_two_heads(built.dense)
        return build(
            built.target.architecture,
            built.config,
            built.target.in_memory(built.entries),
            distributed_config=distributed_config,
            dtype=dtype,
            experts_implementation=experts_implementation,
            experts=built.expert_counts,
        )
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
    experts: Collection[int] | None = None,
) -> PreTrainedModel:
    """Return a model of the class `architecture` with each of its parameters read from `tensors`.

    Raises `UpcycleError` if the layout does not fit. A parameter that nothing defines is a bug of ours.
    """
    from upcycle.hf import filling, models, opening

    options: dict[str, Any] = {}
    if distributed_config is not None:
        options["distributed_config"] = _layout(distributed_config, experts)
    cls = models.architecture(architecture)
    if options and (target := targets.opened(config)) is not None:
        layout = options["distributed_config"]
        target.refuse_layout(config, tp_size=layout.tp_size, ep_size=layout.ep_size)
    opening.refuse_unknown(experts_implementation)
    if experts_implementation is not None:
        options["experts_implementation"] = experts_implementation
    model = filling.fill_from(
        cls,
        config,
        {name: _slices(entry) for name, entry in tensors.items()},
        dtype=_dtype(dtype if dtype is not None else str(config.get("dtype") or "float32")),
        **options,
    )
    opening.choose_experts(model, experts_implementation)
    return model


def _slices(entry: Entry) -> Slices:
    """Return an entry in the form that transformers' loader asks for."""
    from upcycle.hf.filling import Slices

    return Slices(
        shape=tuple(entry.shape),
        dtype=entry.dtype,
        read=lambda ranges: as_tensor(entry.lazy.read(ranges, entry.dtype)),
    )


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """Return the array as a tensor over the same memory; numpy's bfloat16 is not torch's."""
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _dtype(given: str | torch.dtype) -> torch.dtype:
    found = given if isinstance(given, torch.dtype) else getattr(torch, given, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UpcycleError(f"dtype = {given!r}; allowed: {', '.join(TORCH_NAMES.values())}")
    return found


def _layout(given: DistributedConfig | dict[str, Any], experts: Collection[int] | None) -> DistributedConfig:
    """Return the layout if it fits the world size and the experts.

    transformers silently ignores some layouts that do not fit.
    """
    from transformers.distributed import DistributedConfig

    asked = given if isinstance(given, dict) else {}
    if asked.get("enable_expert_parallel") and not asked.get("ep_size"):
        raise UpcycleError(
            "enable_expert_parallel alone does nothing; set ep_size, with fsdp_size or tp_size"
        )
    try:
        layout = given if isinstance(given, DistributedConfig) else DistributedConfig(**given)
    except (TypeError, ValueError) as error:
        raise UpcycleError(f"distributed_config does not fit: {error}") from None
    world = int(os.environ.get("WORLD_SIZE", "1"))
    sizes = f"fsdp_size = {layout.fsdp_size}, tp_size = {layout.tp_size}, ep_size = {layout.ep_size}"
    product = layout.dp_size * layout.tp_size * (layout.pp_size or 1)
    if product != world:
        raise UpcycleError(
            f"{sizes} ask for {product} process(es) and there are {world}; start as many with torchrun"
        )
    if layout.ep_size > 1 and experts is not None and not experts:
        raise UpcycleError(f"{sizes}: a dense model has no experts to share out; set ep_size = 1")
    if wrong := [count for count in experts or () if count % layout.ep_size]:
        raise UpcycleError(f"{sizes}: ep_size must divide the {wrong[0]} experts of a layer")
    return layout
