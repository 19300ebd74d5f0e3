"""`upcycle train --dry-run`: the layout of a run in a world of any size, built on one process without a GPU.

This process is one rank after another (`fake_rank.py`). Nothing is written. Of the source, and of a teacher,
only headers are read; of one on the hub, its tokenizer is fetched as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from transformers import PreTrainedModel

from upcycle.checkpoints.hub import outline
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError, cut
from upcycle.hf import building, packing
from upcycle.hf.even_dispatch import EvenDispatch
from upcycle.nn import kernels
from upcycle.tasks import POSITIONS, Task
from upcycle.training import (
    beginning,
    effort,
    enter,
    examining,
    fake_rank,
    fit,
    gradients,
    kept_logits,
    micro_batch,
    start,
    step,
    teacher,
)
from upcycle.training.anatomy import Anatomy
from upcycle.training.course import Course, Leg
from upcycle.training.examining import Examiner
from upcycle.training.fake_rank import Asked
from upcycle.training.parallel import Ranks
from upcycle.training.routing import Routers
from upcycle.training.run import Run
from upcycle.training.sections import Parallel
from upcycle.training.start import Start

_MOST = 8  # ranks that are built, spread evenly over a larger world
_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Held:
    """The memory that one rank holds between two steps, in bytes."""

    rank: int
    weights: int
    gradients: int
    moments: int
    reads: int  # of its tensors, in the type that they are stored in
    over_even_share: float  # weights, in even shares of the whole model
    teacher: int = 0  # weights of a teacher that runs beside the steps

    @property
    def total(self) -> int:
        """The bytes of weights, gradients and moments, and of the teacher's weights."""
        return self.weights + self.gradients + self.moments + self.teacher


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The layout of a run in a world of `world` processes."""

    world: int
    layout: Mapping[str, int]
    precision: str
    parameters: int
    active_parameters: int
    steps: int
    rows: int  # of the global batch
    tokens_per_step: int
    rows_per_rank: int
    micro_batch: int | None  # rows of a forward pass; None: as many as fit when the run begins
    activations_per_row: int  # bytes, estimated
    stepped: int  # steps that were simulated
    not_stepped: str | None  # the reason, if there are none
    warnings: tuple[str, ...]
    ranks: tuple[Held, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the rehearsal as JSON."""
        return asdict(self)


def rehearse(run: Run, world: int = 1, examiner: Examiner | None = None) -> Rehearsal:
    """Build some ranks of a run in a world of so many processes, and simulate two steps of the first.

    Raises `UpcycleError` for what the run would refuse before its first step.
    """
    if world < 1:
        raise UpcycleError(f"world = {world}; it must be 1 or more")
    if dist.is_initialized() or "RANK" in os.environ:
        raise UpcycleError("a dry run is one process; start it without torchrun and give --world")
    begun = start.start_of(run, outline)
    task = beginning.admitted(run, begun)
    if wrong := beginning.first_refusals(run, begun, task):
        raise UpcycleError(wrong[0])
    examining.refuse(run, examiner, begun.subject)
    layout = run.parallel.layout(world)
    lengths = task.lengths(run.train.sequence_length, begun.subject)
    precision = fit.precision(run)
    held = []
    for rank in sorted({place * (world - 1) // (_MOST - 1) for place in range(_MOST)}):
        with fake_rank.as_rank(run, begun, rank, world, precision) as here:
            if rank == 0:
                fit.refuse_uneven_rows(run, layout.dp)
                fit.refuse_broken_groups(run, begun.built, lengths, layout.dp)
                not_stepped = _not_stepped(run, begun, task, here)
            held.append(_held(run, begun, here, precision))
    share = run.train.rows // layout.dp
    return Rehearsal(
        world=world,
        layout=asdict(layout),
        precision=precision,
        parameters=begun.parameters,
        active_parameters=begun.active_parameters,
        steps=run.train.total_steps,
        rows=run.train.rows,
        tokens_per_step=run.train.rows * sum(lengths.values()),
        rows_per_rank=share,
        micro_batch=None if run.train.micro_batch is None else min(run.train.micro_batch, share),
        activations_per_row=micro_batch.bytes_of_row(run, begun, lengths, precision),
        stepped=0 if not_stepped else _STEPS,
        not_stepped=not_stepped,
        warnings=tuple(fit.warnings(run, begun.built)),
        ranks=tuple(held),
    )


def _blank(begun: Start, asked: Asked) -> Start:
    """Return a start whose tensors are zeros; the bytes that are asked of them are noted."""
    tensors = {name: entry.lazy for name, entry in begun.entries.items()}
    return replace(begun, entries=fake_rank.blank(tensors, asked))


def _held(run: Run, begun: Start, here: Ranks, precision: str) -> Held:
    """Build a rank's part of the model, and return what it holds in the stage that needs the most."""
    asked = Asked()
    with fake_rank.without_data():
        model = start.model_of(_blank(begun, asked), run, here, precision)
        routers, course = Routers.of(model), Course(run)
        anatomy = enter.anatomy_of(course, begun, model, routers)
        beside = 0
        if begun.teacher is not None and run.teacher is not None and run.teacher.top_logits is None:
            taught_by = _teacher(begun.teacher, here, precision, asked)
            beside = sum(gradients.local(p).nbytes for p in taught_by.parameters())
        found = [_held_in(leg, begun, model, routers, anatomy, here, asked) for leg in course.legs]
        return replace(max(found, key=lambda held: held.total), teacher=beside)


def trained(run: Run, lengths: Mapping[str, int]) -> tuple[frozenset[str], float]:
    """Return what a run without stages trains, and the forward passes that a step costs, with all scores.

    Parameters go by the names of their tensors (`Target.in_memory`).
    """
    run, begun = replace(run, parallel=Parallel()), start.start_of(run, outline)
    with fake_rank.as_rank(run, begun, 0, 1, "float32") as here, fake_rank.without_data():
        model = start.model_of(_blank(begun, Asked()), run, here, "float32")
        anatomy = enter.anatomy_of(Course(run), begun, model, Routers.of(model))
        assert anatomy is not None
        chosen = anatomy.chosen(run.train.only, run.train.freeze)
        names = building.renamed(model, begun.in_memory(begun.entries))
        told = frozenset(names[name] for name in chosen if name in names)
        return told, effort.passes(anatomy, chosen, lengths, begun, all_scores=True)


def _held_in(
    leg: Leg,
    begun: Start,
    model: PreTrainedModel,
    routers: Routers | None,
    anatomy: Anatomy | None,
    here: Ranks,
    asked: Asked,
) -> Held:
    """Return what a rank holds in one stage, without a teacher."""
    _, updater = enter.prepared(leg.run, model, begun, routers, anatomy)
    parameters = list(model.parameters())
    weights = sum(gradients.local(p).nbytes for p in parameters)
    states = [
        t
        for group in updater.param_groups
        for p in group["params"]
        for t in updater.state[p].values()
        if isinstance(t, torch.Tensor)
    ]
    return Held(
        rank=here.rank,
        weights=weights,
        gradients=sum(gradients.local(p).nbytes for p in parameters if p.requires_grad),
        moments=sum(gradients.local(t).nbytes for t in states),
        reads=asked.nbytes,
        over_even_share=weights * here.layout.replica / sum(p.nbytes for p in parameters),
    )


def _teacher(dense: Dense, here: Ranks, precision: str, asked: Asked) -> PreTrainedModel:
    """Build a rank's part of the teacher; the bytes that it reads are noted."""
    return teacher.model_of(dense, here, precision, fake_rank.blank(dense.stored, asked))


def _not_stepped(run: Run, begun: Start, task: Task, here: Ranks) -> str | None:
    """Simulate steps; return the reason if that cannot be done.

    They run in bfloat16 with grouped products, because torch knows the shapes of those alone. As many tokens
    go to each rank that has experts.
    """
    count, length = run.train.rows // here.dp_size, run.train.sequence_length
    shapes = task.shapes(count, length)
    if shapes is None:
        return f"rows of {task.name} are known only with the data"
    train = replace(run.train, precision="bfloat16", experts_implementation=None, compile=False)
    if begun.built and begun.built.sites:
        experts = start.experts_implementation(begun, replace(run, train=train), torch.bfloat16)
        if experts != kernels.GROUPED:
            return "experts of this width run one after another, and then shapes depend on values"
        train = replace(train, experts_implementation=experts)
    run = replace(run, train=train)
    try:
        with fake_rank.without_data():
            model = start.model_of(_blank(begun, Asked()), run, here, "bfloat16")
            routers, course = Routers.of(model), Course(run)
            anatomy = enter.anatomy_of(course, begun, model, routers)
            trainee = enter.first(
                course.legs[0],
                model=model,
                task=task,
                begun=begun,
                routers=routers,
                here=here,
                precision="bfloat16",
                anatomy=anatomy,
            )
            if course.legs[0].run.data.isolate:
                shapes |= {POSITIONS: (count, length + 1)}
            batch = {n: torch.zeros(s, dtype=torch.long, device=here.device) for n, s in shapes.items()}
            if begun.teacher is not None and run.teacher is not None:
                if (kept := run.teacher.top_logits) is None:
                    model = _teacher(begun.teacher, here, "bfloat16", Asked())
                    trainee = replace(trainee, teacher=teacher.Beside(model=model))
                else:
                    shape = (count, length, kept)
                    batch[kept_logits.LOGS] = torch.zeros(shape, device=here.device)
                    batch[kept_logits.IDS] = torch.zeros(shape, dtype=torch.long, device=here.device)
                    trainee = replace(trainee, teacher=kept_logits.KeptLogits(segments=(), places={}))
            readers = [trainee.model, model]  # and a teacher beside it
            if course.legs[0].run.data.isolate and any(map(packing.asks_lengths, readers)):
                return "how long documents are is known only with the data"
            with EvenDispatch(trainee.model, ep=here.layout.ep, tp=here.layout.tp):
                for number in range(_STEPS):
                    step.queue_step(trainee, batch, number, course.legs[0].rate(number))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        return f"{error.func} depends on values, and a dry run has none"
    except RuntimeError as error:
        return cut(str(error).splitlines()[0], 200)
    return None
