"""A step of training on one rank of a world that is not there, in tensors that have shapes alone.

torch's fake process group answers every collective at once, and `FakeTensorMode` computes shapes and no
values, so a step of any model on any number of ranks runs on one process. torch's `MemTracker` counts the
storages that are alive, and `Traffic` the collectives with their bytes.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, masking_utils
from transformers.distributed import DistributedConfig

from upcycle.blueprints.blueprint import Blueprint
from upcycle.forecast.setting import Recompute
from upcycle.hf import building, distributing, heads, meshes, models, opening
from upcycle.nn import kernels
from upcycle.sharding.layout import Layout
from upcycle.training import chunked_entropy, gradients, optimizer, recomputing
from upcycle.training.optimizers import Optimizer

aten = torch.ops.aten


@dataclass(frozen=True)
class Step:
    """The measurements of one step: the most bytes alive, and the bytes of each kind of collective."""

    peak: int
    parts: dict[str, int]
    traffic: dict[tuple[str, int], tuple[int, int]]  # kind and number of ranks: times, bytes
    waits: tuple[int, ...] = ()  # all-gathers that are on their way whenever the host reads a number


class Traffic(TorchDispatchMode):
    """Counts collectives: kind, ranks, and the bytes of the larger of input and output."""

    KINDS = (
        ("alltoall", "all_to_all"), ("all_to_all", "all_to_all"), ("reduce_scatter", "reduce_scatter"),
        ("allgather", "all_gather"), ("all_gather", "all_gather"), ("allreduce", "all_reduce"),
        ("all_reduce", "all_reduce"),
    )  # fmt: skip

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()
        self.bytes: Counter[tuple[str, int]] = Counter()
        self.pairs = pairs
        self.waits: list[int] = []

    @property
    def counted(self) -> dict[tuple[str, int], tuple[int, int]]:
        """The times and the bytes among more than one rank, by kind and number of ranks."""
        return {kind: (self.seen[kind], self.bytes[kind]) for kind in self.seen if kind[1] > 1}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented
        if func is aten._local_scalar_dense.default:  # the numbers of rows sent to and got from a rank
            self.waits.append(sum(n for (kind, _), n in self.seen.items() if kind == "all_gather"))
            return self.pairs
        if func is aten.bincount.default:  # whose shape depends on values if there are more than `minlength`
            return args[0].new_zeros((kwargs or {}).get("minlength", 0) or args[2])
        out = func(*args, **kwargs or {})
        if func in collective_ops - sync_ops:
            name = func.__name__
            kind = next(kind for part, kind in self.KINDS if part in name)
            group = CollectiveOp.get_process_group(func, args)
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
            self.seen[kind, group.size()] += 1
            self.bytes[kind, group.size()] += max(t.numel() * t.element_size() for t in tensors)
        return out


class Peak(MemTracker):
    """torch's tracker without its statistics of each module, whose cost grows as the square of the layers."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        kept, self.memory_tracking = self.memory_tracking, {}
        super()._update_peak_stats(peak_state)
        self.memory_tracking = kept


@contextmanager
def world(size: int, rank: int = 0) -> Iterator[None]:
    """A process group of so many ranks, of which only `rank` is there."""
    before = dict(os.environ)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0")
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it holds meshes, and the next world may have equal ones
        os.environ.clear()
        os.environ.update(before)


def entropy(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The cross-entropy as a step of training computes it: in chunks, if there are many logits."""
    if chunked_entropy.is_worth(ids.numel(), heads.words(model)):
        return heads.without_logits(
            model, {"input_ids": ids}, lambda hidden, head: chunked_entropy.cross_entropy(hidden, ids, head)
        )
    logits = model(input_ids=ids).logits
    wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, ids.flatten(), reduction="sum")


@contextmanager
def distributed(
    built: Blueprint, layout: Layout, precision: Literal["mixed", "bfloat16"]
) -> Iterator[PreTrainedModel]:
    """The part of a blueprint's model that the first rank of a layout has, in tensors without data."""
    config = DistributedConfig(
        dp_replicate_size=layout.replicate, fsdp_size=layout.fsdp, tp_size=layout.tp, ep_size=layout.ep,
        fsdp_mixed_precision=precision == "mixed" and layout.dp > 1,
    )  # fmt: skip
    tensors = built.target.in_memory(built.entries)
    widths = [e.shape[-1] for e in tensors.values() if len(e.shape) == 3]
    how = kernels.implementation(widths, 2)
    dtype = torch.float32 if precision == "mixed" else torch.bfloat16
    with (
        world(layout.world),
        mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None),
    ):
        model = building.on_meta(
            models.architecture(built.target.architecture), built.config, dtype=dtype,
            experts_implementation=how,
        )  # fmt: skip
        distributing.distribute(model, config, meshes.meshes(layout))
        with FakeTensorMode(allow_non_fake_inputs=True):
            distributing.materialize(model, lambda names, memory: True, torch.device("cpu"))
            building.finish(model, torch.device("cpu"))
            opening.choose_experts(model, how)
            model.config.use_cache = False
            yield model


def step(
    built: Blueprint,
    layout: Layout,
    *,
    rows: int,
    length: int,
    precision: Literal["mixed", "bfloat16"] = "mixed",
    recompute: Recompute = False,
) -> Step:
    """Forward, cross-entropy, backward and the norm of the gradient on `rows` rows of `length`."""
    with distributed(built, layout, precision) as model:
        if recompute:
            recomputing.install(model, recompute)
        model.train()
        moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in model.parameters()]
        ids = torch.zeros(rows, length, dtype=torch.long)
        pairs = rows * length * built.sites[0].top_k // layout.ep // layout.tp if built.sites else 1
        memory, traffic = Peak(), Traffic(pairs)
        memory.track_external(model, *itertools.chain(*moments))
        with memory, traffic:
            loss = entropy(model, ids)
            (loss * layout.dp).backward()
            del loss
        with traffic:
            gradients.squared_norms({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    found = memory.get_tracker_snapshot("peak")[torch.device("cpu")]
    parts = {getattr(kind, "value", kind): size for kind, size in found.items()}
    return Step(parts.pop("Total"), parts, traffic.counted, tuple(traffic.waits))


def update_peak(built: Blueprint, layout: Layout, settings: Optimizer) -> int:
    """Return the most bytes alive in an update beside weights, gradients and the optimizer's state."""
    with distributed(built, layout, "mixed") as model:
        made = optimizer.make(model, settings)
        optimizer.skip_if(made, torch.zeros(()))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        made.step()  # which makes what is kept
        kept = [t for state in made.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        memory = Peak()
        memory.track_external(model, *kept, *(p.grad for p in model.parameters()))
        before = _total(memory, "current")
        with memory:
            made.step()
    return _total(memory, "peak") - before


def _total(memory: Peak, when: Literal["current", "peak"]) -> int:
    found = memory.get_tracker_snapshot(when)[torch.device("cpu")]
    return next(size for kind, size in found.items() if getattr(kind, "value", kind) == "Total")


def update(built: Blueprint, layout: Layout, settings: Optimizer) -> dict[tuple[str, int], tuple[int, int]]:
    """Return the collectives of an update of an optimizer: times and bytes, by kind and number of ranks."""
    with distributed(built, layout, "mixed") as model:
        made = optimizer.make(model, settings)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with Traffic(1) as traffic:
            made.step()
    return traffic.counted
