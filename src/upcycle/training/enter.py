"""Brings a model into a stage of its run: what is trained there, and an optimizer for that."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from upcycle.families._training import trained
from upcycle.tasks import Task
from upcycle.training import freezing, optimizer, start
from upcycle.training.anatomy import Anatomy
from upcycle.training.course import Course, Leg
from upcycle.training.parallel import Ranks
from upcycle.training.routing import Routers
from upcycle.training.run import Run
from upcycle.training.spikes import Recent
from upcycle.training.start import Start
from upcycle.training.step import Trainee


def anatomy_of(
    course: Course, begun: Start, model: PreTrainedModel, routers: Routers | None
) -> Anatomy | None:
    """Return the parts of a model that is as it was built; None if every stage trains everything.

    Raises `UpcycleError` for a stage that names a part which the model does not have, or trains nothing.
    """
    named = [leg for leg in course.legs if leg.run.train.only is not None or leg.run.train.freeze is not None]
    if not named:
        return None
    anatomy = Anatomy(
        model=model,
        family=trained(begun.dense.family, "train.only and train.freeze"),
        stacks=begun.dense.stacks,
        routers=routers,
    )
    for leg in named:
        anatomy.chosen(leg.run.train.only, leg.run.train.freeze)
    return anatomy


def first(
    leg: Leg,
    *,
    model: PreTrainedModel,
    task: Task,
    begun: Start,
    routers: Routers | None,
    here: Ranks,
    precision: str,
    anatomy: Anatomy | None,
) -> Trainee:
    """Return a model in the stage with which its training begins, or goes on."""
    kept = freeze(leg.run, model, anatomy)
    recent = Recent(leg.run.spikes, here.device)
    return Trainee(
        model=model,
        task=task,
        start=begun,
        optimizer=optimizer.make(model, leg.run.optimizer, start.scales(begun, leg.run, model, routers)),
        routers=routers,
        run=leg.run,
        ranks=here,
        precision=precision,
        kept=kept,
        recent=recent,
    )


def next_stage(trainee: Trainee, leg: Leg, anatomy: Anatomy | None) -> Trainee:
    """Return a model in the next stage. What goes on being trained keeps the optimizer's state."""
    if trainee.recent is not None and leg.run.data != trainee.run.data:
        trainee.recent.restore()  # other data has other losses
    if anatomy is None:
        return replace(trainee, run=leg.run)
    model, before = trainee.model, trainee.optimizer
    kept = freeze(leg.run, model, anatomy)
    rates = start.scales(trainee.start, leg.run, model, trainee.routers)
    made = optimizer.make(model, leg.run.optimizer, rates)
    optimizer.keep_state(made, before)
    return replace(trainee, run=leg.run, optimizer=made, kept=kept)


def freeze(run: Run, model: PreTrainedModel, anatomy: Anatomy | None) -> freezing.Kept | None:
    """Let a model train what a stage's run names; return the experts that stay within trained stacks."""
    if anatomy is None:
        return None
    return freezing.freeze(model, anatomy.chosen(run.train.only, run.train.freeze), anatomy.counts)


def describe(leg: Leg, begun: Start, anatomy: Anatomy | None) -> str | None:
    """Return a sentence on what a stage trains; None if it is the whole of a run without stages."""
    what = f"stage {leg.name}, {leg.steps:,} steps" if leg.name else ""
    if anatomy is not None:
        numbers = anatomy.size(anatomy.chosen(leg.run.train.only, leg.run.train.freeze))
        what = f"{what}: {numbers:,}" if what else f"{numbers:,}"
        return f"{what} of {begun.parameters:,} parameters are trained"
    return what or None
