"""Brings a model into a stage of its run: what is trained there, and an optimizer for that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
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
from upcycle.training.trainee import Trainee


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
        anchors=_anchors(begun),
    )
    for leg in named:
        anatomy.chosen(leg.run.train.only, leg.run.train.freeze)
    return anatomy


def _anchors(begun: Start) -> frozenset[int]:
    if begun.built is None:
        return frozenset()
    recipe = begun.built.recipe
    return recipe.init.anchors(recipe.moe.num_experts)


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
    kept, updater = prepared(leg.run, model, begun, routers, anatomy)
    return Trainee(
        model=model,
        task=task,
        start=begun,
        optimizer=updater,
        routers=routers,
        run=leg.run,
        ranks=here,
        precision=precision,
        kept=kept,
        recent=Recent(leg.run.spikes, here.device),
    )


def next_stage(trainee: Trainee, leg: Leg, anatomy: Anatomy | None) -> Trainee:
    """Return a model in the next stage. What goes on being trained keeps the optimizer's state.

    The optimizer of `trainee` has no state afterwards, so that what is no longer trained leaves the memory.
    """
    if trainee.recent is not None and _judged_by(leg.run) != _judged_by(trainee.run):
        trainee.recent.restore()
    if anatomy is None:
        return replace(trainee, run=leg.run)
    kept, updater = prepared(
        leg.run, trainee.model, trainee.start, trainee.routers, anatomy, before=trainee.optimizer
    )
    trainee.optimizer.state.clear()
    return replace(trainee, run=leg.run, optimizer=updater, kept=kept)


def _judged_by(run: Run) -> tuple[Any, ...]:
    """Return what the losses and gradients of a stage depend on, apart from the weights."""
    return run.data, run.router, run.train.only, run.train.freeze


def prepared(
    run: Run,
    model: PreTrainedModel,
    begun: Start,
    routers: Routers | None,
    anatomy: Anatomy | None,
    before: torch.optim.Optimizer | None = None,
) -> tuple[freezing.KeptExperts | None, torch.optim.Optimizer]:
    """Let a model train what a stage's run names.

    Returns the experts that stay within trained stacks, and an optimizer of what is trained, with the state
    that the optimizer `before` has of it.
    """
    kept = None
    if anatomy is not None:
        kept = freezing.freeze(model, anatomy.chosen(run.train.only, run.train.freeze), anatomy.counts)
    return kept, optimizer.make(model, run.optimizer, start.scales(begun, run, model, routers), before)


def describe(leg: Leg, begun: Start, anatomy: Anatomy | None) -> str | None:
    """Return a sentence on what a stage trains; None if it is the whole of a run without stages."""
    what = f"stage {leg.name}, {leg.steps:,} steps" if leg.name else ""
    if anatomy is not None:
        numbers = anatomy.size(anatomy.chosen(leg.run.train.only, leg.run.train.freeze))
        what = f"{what}: {numbers:,}" if what else f"{numbers:,}"
        return f"{what} of {begun.parameters:,} parameters are trained"
    return what or None
