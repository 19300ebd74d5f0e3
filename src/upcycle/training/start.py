"""The starting point of a run: the dense model, the MoE made from it, or random weights of either shape.

In all three cases it maps names to lazy tensors, so that every rank makes only its own part, and random
weights are the same for every topology.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from upcycle import loading
from upcycle.blueprints.blueprint import Blueprint
from upcycle.blueprints.cost import flops_per_row, plan_of
from upcycle.blueprints.making import blueprint
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.hub import Opener, open_checkpoint
from upcycle.dense.admission import admit
from upcycle.dense.source import Dense
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.families import Family, _stacks
from upcycle.families._training import trained
from upcycle.families._weights import Constant, Identity, Initial, Normal
from upcycle.families._wrappers import TEXT
from upcycle.hf import carriers, packing
from upcycle.hf.body import Body
from upcycle.nn import kernels
from upcycle.nn.experts import Experts
from upcycle.tensors import rng
from upcycle.tensors.computed import Drawn, Fill
from upcycle.tensors.entries import Entry
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.moved import Folded, Stack
from upcycle.training import drop_path, dropout, layer_decay, recomputing, teacher, weightless
from upcycle.training.course import Course
from upcycle.training.head import renewed
from upcycle.training.parallel import Ranks
from upcycle.training.routing import Routers
from upcycle.training.run import Run, Train

_MAY_SKIP = "skip_fwd_side_effects_in_bwd_under_checkpoint"  # a setting of torch.compile


@dataclass(frozen=True, kw_only=True)
class Start:
    """The model that a run trains, before it is built."""

    dense: Dense
    built: Blueprint | None
    architecture: str
    config: dict[str, Any]  # the model's config.json
    entries: Mapping[str, Entry]  # by the name on disk
    from_scratch: bool
    teacher: Dense | None = None  # the model that the run learns from

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(e.lazy.size for e in self.entries.values())

    @property
    def active_parameters(self) -> int:
        """The number of parameters that a token uses."""
        return plan_of(self.built).active_parameters if self.built else self.parameters

    @property
    def planned(self) -> Mapping[str, Entry]:
        """The tensors as the source and the recipe give them, by the names on disk.

        Those of `entries` differ if they are drawn anew.
        """
        return self.built.entries if self.built else self.dense.entries

    def in_memory(self, entries: Mapping[str, Entry]) -> Mapping[str, Entry]:
        """Return tensors, given by their names on disk, as the class holds them in memory."""
        return self.built.target.in_memory(entries) if self.built else entries

    def on_disk(self, entries: Mapping[str, Entry]) -> Mapping[str, Entry]:
        """Return tensors by their names on disk, given as `in_memory` returns them."""
        return self.built.target.on_disk(entries) if self.built else entries

    @cached_property
    def subject(self) -> Subject:
        """The model as its task sees it."""
        return Subject(folder=self.dense.checkpoint.folder, config=self.config)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that a run reads: the source, any others, and the teacher."""
        own = self.built.checkpoints if self.built else [self.dense.checkpoint]
        return own if self.teacher is None else [*own, self.teacher.checkpoint]

    def training_flops_per_row(
        self, lengths: Mapping[str, int], passes: float = 3, *, all_scores: bool = False
    ) -> int:
        """Return the FLOPs of training on a row with `lengths` tokens per stack: three forward passes.

        They are fewer if a part is not trained (`effort.py`). A teacher adds one of its own. `all_scores`
        counts both halves of causal attention, as `flops_per_row` says.
        """
        teacher = self.teacher
        taught = 0 if teacher is None else flops_per_row(teacher, None, lengths, all_scores=all_scores)
        return round(passes * flops_per_row(self.dense, self.built, lengths, all_scores=all_scores)) + taught

    def training_flops(self, length: int, *, all_scores: bool = False) -> int:
        """Return the same for one token of a row of `length`, for a model of text with one length."""
        lengths = dict.fromkeys(self.dense.lengths, length)
        return self.training_flops_per_row(lengths, all_scores=all_scores) // length


def start_of(run: Run, opener: Opener = open_checkpoint) -> Start:
    """Return the start of a run, read from headers alone.

    `opener` opens its checkpoints; `outline` is enough unless weights are read.
    """
    if run.recipe and run.recipe.moe.part != TEXT:
        raise UpcycleError(
            f"moe.part = {run.recipe.moe.part}: `upcycle train` reads texts, which never reach a vision "
            f"tower, so its experts would not be trained; set moe.part = text, or build the model with "
            f"upcycle.load and train it in a loop of your own"
        )
    if run.recipe and run.recipe.moe.mtp != "drop":
        raise UpcycleError(
            f"moe.mtp = {run.recipe.moe.mtp}: transformers does not run blocks that predict further tokens, "
            f"so `upcycle train` would not train them, and they would not fit the model; set it to drop"
        )
    source = weightless.opened(run.source) if run.from_scratch else None
    built = blueprint(source or run.source, run.recipe, opener=opener) if run.recipe else None
    dense = built.dense if built else admit(source or opener(run.source), drop=run.drop)
    if built:
        architecture, config, entries = built.target.architecture, built.config, built.entries
    else:
        config = dict(dense.checkpoint.config)
        architecture = dense.architecture
        entries = dense.entries
    if run.from_scratch:
        entries = _from_scratch(dense, built, entries, run.seed)
    if run.task is not None and run.task.classes:
        config, entries = renewed(dense, config, entries, run.task, run.seed)
    return Start(
        dense=dense,
        built=built,
        architecture=architecture,
        config=dict(config),
        entries=entries,
        from_scratch=run.from_scratch,
        teacher=teacher.admitted(run, opener),
    )


def _from_scratch(
    dense: Dense, built: Blueprint | None, entries: Mapping[str, Entry], seed: int
) -> dict[str, Entry]:
    """Return every tensor with transformers' initialisation, but normals are not truncated.

    Raises `UpcycleError` for a tensor whose initial value neither the family nor the target defines.
    """
    family = trained(dense.family, "from_scratch = true")
    own = {dense.place.stored(name): name for name in dense.tensors}
    identity = built.target.norm_identity(family) if built else family.norm_identity
    out = {}
    for name, entry in entries.items():
        begins: Initial | None = None
        if built:
            begins = built.target.begins(family, dense, name, built.weights[name], entry)
        elif name in own:
            begins = family.initial(dense.config, own[name], dense.weights[own[name]])
        if begins is None:
            raise UpcycleError(
                f"from_scratch = true: nothing says what {name} of a {family.model_type} starts as; take "
                f"from_scratch out, or let `initial` of the family say it"
            )
        out[name] = _begun(name, entry, begins, identity, seed)
    return out


def _begun(name: str, entry: Entry, begins: Initial, identity: float, seed: int) -> Entry:
    """Return the tensor with its initial values, in float32."""
    if isinstance(begins, Normal):
        return Entry(_drawn(entry.shape, begins.deviation, name, seed), "F32")
    if isinstance(begins, Constant):
        return Entry(Fill(entry.shape, "F32", begins.value), "F32")
    if isinstance(begins, Identity):
        return Entry(Fill(entry.shape, "F32", identity), "F32")
    return entry


def _drawn(shape: tuple[int, ...], deviation: float, name: str, seed: int, place: int = 0) -> Lazy:
    """Draw a tensor from N(0, deviation^2), one stream per matrix; a convolution kernel is one matrix."""
    if len(shape) == 4:
        flat = (shape[0], math.prod(shape[1:]))
        return Folded(_drawn(flat, deviation, name, seed), shape[1:])
    if len(shape) == 2:
        rows, columns = shape
        return Drawn((rows, columns), "F32", "normal", deviation, rng.key(seed, name, "from scratch", place))
    return Stack(
        tuple(_drawn(shape[1:], deviation, name, seed, place * shape[0] + e) for e in range(shape[0]))
    )


def model_of(start: Start, run: Run, ranks: Ranks, precision: str) -> PreTrainedModel:
    """Build the model in training mode, each rank with its own part; the source's files stay open."""
    dtype = torch.float32 if precision == "mixed" else getattr(torch, precision)
    model = build(start, start.entries, run, ranks, dtype)
    _refuse_wide(model, ranks, precision)
    if Course(run).isolates:
        _refuse_joined(model, start.dense.family)
        carriers.install(model, carriers.layers_of(model, start.dense.family, start.dense.config))
    if model.device != ranks.device:
        model = model.to(ranks.device)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    if run.train.activation_checkpointing:
        recomputing.install(model, run.train.activation_checkpointing)
    if run.train.drop_path is not None:
        drop_path.install(model, start.dense.family, start.dense.config, run.train.drop_path)
    _set_expert_dropout(model, run.train)
    if run.train.compile:
        _compile(_blocks(model, start))
    return model.train()


def _refuse_wide(model: PreTrainedModel, ranks: Ranks, precision: str) -> None:
    if precision == "float32" and ranks.device.type == "cuda" and packing.reads_borders(model):
        raise UpcycleError(
            f"train.attn_implementation = {packing.attention(model)} computes in 16 bits, and "
            f"train.precision is float32; set it to mixed or bfloat16, or take sdpa"
        )


def _refuse_joined(model: PreTrainedModel, family: Family) -> None:
    if not packing.can_keep_apart(model):
        raise UpcycleError(
            f"data.isolate = true: the model runs with attention = {packing.attention(model)}, which "
            f"cannot keep documents apart; allowed: {', '.join(packing.MASKED)} and flash attention"
        )
    if packing.reads_borders(model) and not family.borders:
        raise UpcycleError(
            f"data.isolate = true: {type(model).__name__} of transformers does not tell flash attention "
            f"where documents begin; set train.attn_implementation to sdpa or eager"
        )


def scales(
    start: Start, run: Run, model: PreTrainedModel, routers: Routers | None
) -> dict[str, float] | None:
    """Return the factor on each parameter's learning rate; None if all have the same."""
    if run.train.layer_decay == 1:
        return None
    family, config = start.dense.family, start.dense.config
    return layer_decay.scales(model, family, config, run.train.layer_decay, routers.names if routers else ())


def _set_expert_dropout(model: PreTrainedModel, train: Train) -> None:
    """Set the run's dropout in the experts; the config does not change."""
    if train.expert_dropout is None and not train.expert_output_dropout:
        return
    found = [module for module in model.modules() if isinstance(module, Experts)]
    if not found:
        raise UpcycleError(
            "train.expert_dropout and expert_output_dropout act on experts of moe.target = upcycled, and "
            "this model has none; take them out"
        )
    for experts in found:
        experts.set_dropout(train.expert_dropout, train.expert_output_dropout)


def _blocks(model: PreTrainedModel, start: Start) -> list[nn.Module]:
    """Return the blocks of all stacks."""
    body = Body.of(model)
    return [block for path in _stacks.lists_of(start.dense.stacks) for block in body.blocks(path)]


def _compile(blocks: Iterable[nn.Module]) -> None:
    """Compile every block by itself. Blocks of one kind share a graph, whatever their routers decide.

    Routers leave their outputs on the module, and a block that is recomputed need not do so again. Without
    this permission, torch does not compile blocks that are recomputed.
    """
    if hasattr(torch._dynamo.config, _MAY_SKIP):  # not in every torch that works
        setattr(torch._dynamo.config, _MAY_SKIP, True)
    for block in blocks:
        block.compile()


def build(
    start: Start, entries: Mapping[str, Entry], run: Run, ranks: Ranks, dtype: torch.dtype
) -> PreTrainedModel:
    """Build a model of the run's class from `entries`, by their names on disk; each rank has its own part."""
    config, rate = start.config, run.train.dropout
    return loading.build(
        start.architecture,
        config if rate is None else dropout.set_in(config, start.architecture, rate),
        start.in_memory(entries),
        distributed_config=ranks.config,
        dtype=dtype,
        attn_implementation=run.train.attn_implementation,
        experts_implementation=_experts_on(ranks.device, start, run, dtype)
        if start.built and start.built.sites
        else None,
    )


def _experts_on(device: torch.device, start: Start, run: Run, dtype: torch.dtype) -> str:
    """Return how experts run on a device: as `experts_implementation` says, and one by one on a CPU.

    Grouped products follow autocast, which is what mixed precision is on one process.
    """
    chosen = experts_implementation(start, run, dtype)
    if chosen != kernels.GROUPED:
        return chosen
    asked = run.train.experts_implementation is not None
    return kernels.EXPERT_BY_EXPERT if device.type == "cpu" and not asked else kernels.FOLLOWING


def experts_implementation(start: Start, run: Run, dtype: torch.dtype) -> str:
    """Return the run's setting, or grouped products if rows are multiples of the 16 bytes they need."""
    if run.train.experts_implementation is not None:
        return run.train.experts_implementation
    widths = [e.shape[-1] for e in start.in_memory(start.entries).values() if len(e.shape) == 3]
    itemsize = 2 if run.train.precision != "float32" else dtype.itemsize
    return kernels.implementation(widths, itemsize)


def plain_model(start: Start) -> PreTrainedModel:
    """Build the model on one process with its starting weights, for an export to fill."""
    tensors = start.in_memory(start.entries)
    return loading.build(start.architecture, start.config, tensors, dtype=torch.float32)
