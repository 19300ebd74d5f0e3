"""Checks that a run fits the routers of its model, before the model is built."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from upcycle import tasks
from upcycle.blueprints import caveats
from upcycle.blueprints.blueprint import Blueprint
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.recipe import Recipe
from upcycle.tasks import Task
from upcycle.training.course import Course
from upcycle.training.run import Run


def warnings(run: Run, built: Blueprint | None) -> list[str]:
    """Return warnings for the user before a run costs time: those of `plan` and those of the run itself."""
    out = [] if built is None else caveats.warnings(built)
    if built is not None and run.from_scratch:
        unread = caveats.of_weights(built)
        out = [each for each in out if each not in unread]
    legs = Course(run).legs
    for leg in legs:
        found = leg.run.schedule.warnings(leg.steps)
        moves, whole = leg.run.router.bias_update_steps, run.router.bias_update_steps
        if moves is not None and moves != whole and moves <= leg.first:
            found.append(
                f"router.bias_update_steps = {moves} counts from the first step of the run, and "
                f"{leg.first:,} come before this stage: no bias moves in it; add those, or take it out"
            )
        out += [f"stage {leg.name}: {each}" if leg.name else each for each in found]
    trained = {(leg.run.train.only, leg.run.train.freeze) for leg in legs}
    if run.optimizer.carry_state and len(trained) > 1:
        out.append(
            "optimizer.carry_state = true gives moments to what the first stage trains; what a later one "
            "trains besides begins without"
        )
    return out


def _parts(built: Blueprint | None) -> dict[str, Recipe]:
    return built.parts if built else {}


def refuse_pooling(run: Run, built: Blueprint | None) -> None:
    """Refuse the pooled balance loss if the routers' logits cannot be pooled."""
    if run.router.balance_loss != "pooled":
        return
    of_stack = _parts(built)
    why = "router.balance_loss = pooled puts the logits of all layers together, and"
    if balanced := next((part.router.name for part in of_stack.values() if part.router.balanced), None):
        raise UpcycleError(f"{why} {balanced} needs no balance loss; use per_layer, which leaves it out")
    sizes = {name: f"top-{p.moe.top_k} of {p.moe.num_experts} experts" for name, p in of_stack.items()}
    if len(set(sizes.values())) > 1:
        unlike = " and ".join(f"the {name} has {size}" for name, size in sizes.items())
        raise UpcycleError(f"{why} {unlike}; use per_layer, or the same in both")


def without_loss(run: Run, built: Blueprint | None) -> str | None:
    """Return a sentence about a router loss with a weight that no router computes; None if all are there."""
    if built is None or not built.sites:
        return None
    ours = built.target.has_own_routers
    found = {name for part in built.parts.values() for name in part.router.losses_of_run() if ours}
    lacking = [(name, coef) for name, coef in run.router.coefficients.items() if coef and name not in found]
    if not lacking:
        return None
    name, coef = lacking[0]
    routers = ", ".join(dict.fromkeys(part.router.name for part in built.parts.values()))
    whose = routers if ours else f"they are those of {built.target.model_type}"
    needs = "moe.target = upcycled and router.name = top_k"
    return (
        f"router.{name}_loss_coef = {coef} weighs a loss that no router of this run computes ({whose}); set "
        f"it to 0, or take {needs}{', with router.noise_std above 0' if name == 'load' else ''}"
    )


def refuse_isolation(run: Run, task: Task, subject: Subject) -> None:
    """Refuse `data.isolate` for a task or a model that cannot keep the documents of a row apart."""
    if not run.data.isolate:
        return
    if not task.isolates:
        able = [name for name in tasks.names() if tasks.find(name).isolates]
        raise UpcycleError(
            f"data.isolate = true is for {' and '.join(able)}, and the task is {task.name}; set it to false"
        )
    if (why := subject.tells_apart(run.train.sequence_length)) is not None:
        raise UpcycleError(
            f"data.isolate = true: {subject.architecture} cannot keep the documents of a row apart, because "
            f"{why}; set it to false"
        )


def not_anew(run: Run) -> str | None:
    """Return a sentence about a stage that is to read its data anew and does not; None if there is none.

    Stages of the same [data] have one feed together, which goes on from stage to stage.
    """
    legs = Course(run).legs
    for number, leg in enumerate(legs):
        before = next((each for each in legs[:number] if each.run.data == leg.run.data), None)
        if leg.anew and before is not None:
            return (
                f"stage {leg.name}: anew = true is for a [data] that no earlier stage has, and stage "
                f"{before.name} has the same; take it out, or give the stage other sources or weights"
            )
    return None


def precision(run: Run) -> str:
    """Return the precision of a run; `auto` is mixed on an accelerator and float32 on a CPU."""
    if run.train.precision != "auto":
        return run.train.precision
    return "mixed" if torch.accelerator.is_available() else "float32"


def refuse_uneven_rows(run: Run, dp_size: int) -> None:
    """Refuse a batch that the data-parallel ranks cannot share evenly."""
    if run.train.rows % dp_size:
        raise UpcycleError(
            f"a batch is {run.train.rows} rows, which {dp_size} data-parallel ranks cannot share "
            f"evenly; change train.batch_tokens or train.batch_size"
        )


def refuse_broken_groups(run: Run, built: Blueprint | None, lengths: Mapping[str, int], dp_size: int) -> None:
    """Refuse router groups that do not divide the tokens of a training forward pass."""
    share = run.train.rows // dp_size
    size = min(run.train.micro_batch or share, share)
    for rows in filter(None, (size, share % size)):
        for name, part in _parts(built).items():
            if (group := part.router.group) and rows * lengths[name] % group:
                raise UpcycleError(
                    f"router.group = {group} does not divide the {rows} x {lengths[name]} tokens of a "
                    f"forward pass on one rank; choose a divisor, 0 to route each row by itself, or other "
                    f"batches"
                )
