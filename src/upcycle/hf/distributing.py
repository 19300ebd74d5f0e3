"""Shares a model of transformers out over the ranks of a layout.

Tensor parallelism and the dispatch of tokens to experts are transformers' own, with its plans for each class.
FSDP2 is ours (`placement.py`): transformers shards along the first axis alone, which for experts is their
number.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.distributed.fsdp import is_norm_and_head_pair
from transformers.distributed.tensor_parallel import apply_tensor_parallelism
from transformers.distributed.utils import TransformersDeviceMesh

from upcycle.hf import building, recorded
from upcycle.hf.meshes import Meshes
from upcycle.nn.moe import RouterLayer
from upcycle.sharding import placement
from upcycle.sharding.layout import Layout
from upcycle.sharding.placement import Sharded, Split

DISPATCHED = "ep_dispatch_experts"  # transformers' name for experts that tokens are sent to


def layout_of(config: DistributedConfig) -> Layout:
    """Return the sizes of transformers' config."""
    return Layout(
        replicate=config.dp_replicate_size, fsdp=config.fsdp_size, tp=config.tp_size, ep=config.ep_size
    )


def distribute(model: PreTrainedModel, config: DistributedConfig, meshes: Meshes) -> dict[str, Sharded]:
    """Share out a model on the meta device, and return how each parameter was cut.

    A tied parameter is there under its first name.
    """
    layout = layout_of(config)
    # save_pretrained, generate and others of transformers look at these.
    model.config.distributed_config = config
    model._mesh_manager = TransformersDeviceMesh(meshes.dense, meshes.expert)
    model._device_mesh = meshes.dense
    model._is_distributed_loading_by_transformers = True
    model._tp_size, model._fsdp_size = config.tp_size, config.fsdp_size

    tp_plan, ep_plan, fsdp_plan = model._resolve_parallel_plans(config)
    if layout.tp > 1:
        apply_tensor_parallelism(model, meshes.dense["tp"], tp_plan)
    if layout.ep > 1:
        assert meshes.expert is not None
        apply_expert_parallelism(
            model,
            meshes.expert["ep"],
            meshes.dense["tp"],
            ep_plan,
            ep_implementation=config.ep_implementation,
        )
    building.tie(model)
    known = {name: _sharded(p) for name, p in model.named_parameters()}
    cuts = placement.planned(known, layout)
    if layout.dp > 1:
        _fully_shard(model, config, meshes, ep_plan, fsdp_plan, cuts)
    return cuts


def _sharded(parameter: nn.Parameter) -> Sharded:
    """Return how tensor or expert parallelism has cut a parameter."""
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return Sharded(shape=shape)
    (cut,) = parameter.placements
    if cut.is_replicate():
        return Sharded(shape=shape)
    axis = int(getattr(cut, "dim")) % len(shape)  # noqa: B009 - strided shards have it as well
    if parameter.device_mesh.mesh_dim_names == ("ep",):
        assert axis == 0
        return Sharded(shape=shape, expert=True)
    return Sharded(shape=shape, tp=Split(axis, getattr(cut, "split_factor", 1)))


def _fully_shard(
    model: PreTrainedModel,
    config: DistributedConfig,
    meshes: Meshes,
    ep_plan: Mapping[str, str],
    fsdp_plan: Mapping[str, str],
    cuts: Mapping[str, Sharded],
) -> None:
    """Group parameters as transformers' plan says, and shard each along the axis that was planned.

    A router that is read in float32 is a group of its own (`_apart`). It stays gathered from the forward pass
    to the end of the backward pass: it is small, and a collective costs more than its memory.
    """
    layout = layout_of(config)
    axes = {id(p): Shard(cuts[name].fsdp) for name, p in model.named_parameters()}

    def shard(
        module: nn.Module | list[nn.Module], mesh: Any, *, keep: bool = False, as_stored: bool = False
    ) -> None:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=not keep,
            shard_placement_fn=lambda parameter: axes[id(parameter)],
            **_offloading(config),
            **({} if as_stored else _precision(config)),
        )
        if layout.tp > 1:
            _allow_views(module if isinstance(module, list) else [module])

    apart = _apart(model, config)
    for router in apart.values():
        shard(router, meshes.parameters, keep=True, as_stored=True)
        _allow_views([router])
    fsdp_plan = {name: style for name, style in fsdp_plan.items() if not _is_in(name, apart)}
    if layout.ep > 1:
        for name, module in model.named_modules():
            if ep_plan.get(name) == DISPATCHED:
                shard(module, meshes.experts)
                _average_experts(module, layout)
    # Tied parameters must be in one group, which is that of the whole model.
    several = {name.rpartition(".")[0] for group in building.tied(model) for name in group}
    modules = [
        (name, style, model.get_submodule(name))
        for name, style in fsdp_plan.items()
        if not any(name == owner or owner.startswith(f"{name}.") for owner in several)
    ]
    kept = [(name, module) for name, style, module in modules if style == "keep_full_weight"]
    for _, style, module in modules:
        if style != "keep_full_weight":
            shard(module, meshes.parameters)
    if is_norm_and_head_pair(kept, model):
        shard([module for _, module in kept], meshes.parameters, keep=True)
    else:
        for _, module in kept:
            shard(module, meshes.parameters, keep=True)
    fully_shard(
        model,
        mesh=meshes.parameters,
        shard_placement_fn=lambda parameter: axes[id(parameter)],
        **_offloading(config),
        **_precision(config),
    )
    if layout.tp > 1:
        _allow_views([model])
    model._is_fsdp_managed_module = True  # generate looks at it
    chain = list(_chain(model, fsdp_plan, ep_plan, apart))
    if layout.ep > 1:
        _gather_ahead(chain)
    _gather_behind(chain)


def _allow_views(group: Sequence[nn.Module]) -> None:
    """Let the modules of a group that is sharded return views without a warning of torch.

    A view that is changed in place loses the hook that gathers the group for the backward pass. A router
    stays gathered. Under tensor parallelism most outputs are views, and nobody changes them in place.
    """
    names = ", ".join(type(module).__name__ for module in group)
    warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \({re.escape(names)}\)")


def _apart(model: PreTrainedModel, config: DistributedConfig) -> dict[str, nn.Module]:
    """Return the routers, by their names, that are read in float32 while their blocks are in bfloat16.

    FSDP gathers a group in one type, and its gradients must have one. Under mixed precision it would round
    the weights of a router, and the small steps of its correction bias, which one process reads in float32:
    ours always, and one of transformers if its class keeps it in float32. Without mixed precision, what
    counts is whether a trained parameter has another type than the model.
    """
    kept = building.kept_wide(model, torch.bfloat16)

    def is_wide(name: str, router: nn.Module) -> bool:
        names = (f"{name}.{own}" for own, _ in router.named_parameters())
        if any(p.requires_grad and p.dtype != model.dtype for p in router.parameters()):
            return True
        of_class = isinstance(router, RouterLayer) or any(each in kept for each in names)
        return config.fsdp_mixed_precision and of_class

    return {name: router for name, router in recorded.routers(model) if is_wide(name, router)}


def _is_in(name: str, modules: Iterable[str]) -> bool:
    """Return whether a name is that of one of these modules, or of something in it."""
    return any(name == each or name.startswith(f"{each}.") for each in modules)


@dataclass(frozen=True)
class _Gathered:
    """What FSDP gathers for one entry of the plan, such as a block, in the order of the forward pass."""

    name: str
    own: FSDPModule
    routers: tuple[FSDPModule, ...]  # groups of their own, which stay gathered
    experts: tuple[FSDPModule, ...]  # groups of their own under expert parallelism

    @property
    def parent(self) -> str:
        """The list that a block is in."""
        return self.name.rpartition(".")[0]


def _chain(
    model: PreTrainedModel, fsdp_plan: Mapping[str, str], ep_plan: Mapping[str, str], apart: Iterable[str]
) -> Iterator[_Gathered]:
    """Yield what FSDP gathers, in the order of the forward pass."""
    last: Any = None
    for name, module in model.named_modules():
        if name not in fsdp_plan or not isinstance(module, FSDPModule):
            continue
        if module._get_fsdp_state() is last:
            continue  # two modules that are gathered together
        last = module._get_fsdp_state()
        dispatched = [each for each, style in ep_plan.items() if style == DISPATCHED]
        routers, experts = (
            tuple(
                found
                for each in names
                if _is_in(each, [name]) and isinstance(found := model.get_submodule(each), FSDPModule)
            )
            for names in (apart, dispatched)
        )
        yield _Gathered(name, module, routers, experts)


def _gather_ahead(chain: Sequence[_Gathered]) -> None:
    """Let FSDP gather the next block, its router and its experts as a block begins in the forward pass.

    FSDP gathers a block when the host comes to it, which is soon enough while the host runs ahead of the
    device. Under expert parallelism it does not: in every layer it reads how many tokens go to each rank. In
    the backward pass FSDP gathers the block before by itself, and nothing is read there. torchtitan does this
    in both passes.
    """
    for each, following in itertools.pairwise(chain):
        each.own.set_modules_to_forward_prefetch([following.own, *following.routers, *following.experts])


def _gather_behind(chain: Sequence[_Gathered]) -> None:
    """Let FSDP gather the block before as soon in the backward pass as if the router were no group.

    By itself, FSDP gathers the group that came before in the forward pass. For a block with such a router, or
    for its experts, that is the router, which is still there.
    """
    for before, each in itertools.pairwise(chain):
        if each.routers and before.parent == each.parent:
            (each.own, *each.experts)[-1].set_modules_to_backward_prefetch([before.own])


def _average_experts(module: nn.Module, layout: Layout) -> None:
    """Let the gradients of experts be a mean over all groups of ranks that see different rows.

    The ranks of an expert-parallel group sum theirs by sending tokens, so FSDP must not divide by its own
    size. A factor of its own goes through an operation that gloo does not have, unless it sums and divides
    itself; over one rank it divides in any case.
    """
    module.set_gradient_divide_factor(float(layout.dp))  # type: ignore[operator]
    if layout.efsdp > 1:
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]


def _offloading(config: DistributedConfig) -> dict[str, Any]:
    """Return what `fully_shard` needs to know about offloading."""
    return {"offload_policy": CPUOffloadPolicy()} if config.fsdp_cpu_offload else {}


def _precision(config: DistributedConfig) -> dict[str, Any]:
    """Return what `fully_shard` needs to know about the type in which a group is gathered."""
    if not config.fsdp_mixed_precision:
        return {}
    return {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}


def put_shards_back(model: nn.Module) -> None:
    """Let a model show its sharded parameters; after a forward pass FSDP shows whole ones here and there."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def note_trained(model: nn.Module) -> None:
    """Tell FSDP that other parameters than before have a gradient.

    It notes the types of those that have one before the first forward pass and never again.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                group._init_mp_dtypes()


def materialize(
    model: PreTrainedModel, fill: Callable[[list[str], torch.Tensor], bool], device: torch.device
) -> None:
    """Give every parameter, and every buffer of the state dict, memory on `device` and let `fill` write it.

    `fill` gets the names of a tensor, several if it is tied, and the memory of this rank's part. It returns
    whether it wrote it; transformers initialises what nobody wrote.
    """
    tensors = model.state_dict(keep_vars=True)
    owners: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        owners.setdefault(id(tensor), []).append(name)
    for names in owners.values():
        old = tensors[names[0]]
        new = _empty(old, device)
        made = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        for name in names:
            building.place(model, name, made)
        with torch.no_grad():
            filled = fill(names, made.to_local() if isinstance(made, DTensor) else made)
        if filled:
            building.mark(made)


def _empty(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return memory for a tensor on the meta device, or for this rank's part of it."""
    if not isinstance(tensor, DTensor):
        return torch.empty_like(tensor, device=device)
    return DTensor.from_local(
        torch.empty_like(tensor.to_local(), device=device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tuple(tensor.stride()),
    )
