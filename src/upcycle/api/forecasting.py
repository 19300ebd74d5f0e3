"""`upcycle.foretell`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle import tasks
from upcycle.blueprints.blueprint import Blueprint
from upcycle.blueprints.making import blueprint
from upcycle.checkpoints.hub import peek
from upcycle.dense.admission import admit
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError, shown
from upcycle.forecast import outlook
from upcycle.forecast.outlook import Outlook
from upcycle.forecast.setting import Precision, Recompute, Setting
from upcycle.recipe import RecipeLike
from upcycle.sharding.layout import Layout
from upcycle.system import gpus
from upcycle.system.gpus import Gpu
from upcycle.system.needed import said_if_missing
from upcycle.system.wording import size
from upcycle.tasks._positions import row_of
from upcycle.training import parts
from upcycle.training.course import Course, Leg

if TYPE_CHECKING:
    from upcycle.training.run import Run


def foretell(
    source: str | Path,
    recipe: RecipeLike = None,
    *,
    world: int,
    gpu: str = "H100",
    replicate: int = 1,
    tp: int = 1,
    ep: int = 1,
    rows: int = 1,
    context: int | None = None,
    recompute: Recompute = True,
) -> Outlook:
    """Return what a step of training `recipe`'s model needs on one of `world` GPUs of the kind `gpu`.

    The ranks are laid out as replicate x fsdp x tp, with experts shared out over `ep` of them. A rank
    computes on `rows` rows of `context` tokens. `recompute` is activation checkpointing. Only headers are
    read. Raises `UpcycleError` if source, recipe and layout do not fit.
    """
    sizes = {"world": world, "replicate": replicate, "tp": tp, "ep": ep, "rows": rows}
    for name, value in (sizes if context is None else sizes | {"context": context}).items():
        if type(value) is not int or value < 1:
            raise UpcycleError(f"{name} = {shown(value)}; it must be a whole number of 1 or more")
    if recompute not in (allowed := (True, False, "selective")):
        raise UpcycleError(f"recompute = {shown(recompute)}; allowed: {', '.join(map(str, allowed))}")
    built = blueprint(source, recipe, opener=peek)
    fsdp = world // (replicate * tp)
    layout = Layout(replicate=replicate, fsdp=fsdp, tp=tp, ep=ep)
    _refuse(layout, built, world)
    lengths = row_of(built.dense, context, setting="context")
    setting = Setting(built=built, layout=layout, lengths=lengths, rows=rows, recompute=recompute)
    return outlook.of(setting, gpus.find(gpu))


@said_if_missing()
def foretell_run(run: Run, *, world: int, gpu: str = "H100") -> Outlook:
    """Return what a step of a run needs on one of `world` GPUs of the kind `gpu`.

    Without train.micro_batch a forward pass has as many of a rank's rows as fit. Of several stages it is the
    one that needs the most memory. What Muon and Adafactor exchange in an update is not counted. If a part is
    not trained, this asks torch for the names of parameters, and takes the backward pass to go through all
    blocks. Raises `UpcycleError` if the run does not fit the world, or trains a dense model.
    """
    if run.recipe is None:
        raise UpcycleError("a forecast is for a Mixture of Experts, and the run file has no [moe]; add one")
    built = blueprint(run.source, run.recipe, opener=peek)
    train = run.train
    layout = run.parallel.layout(world)
    _refuse(layout, built, world)
    share = train.rows // layout.dp
    if layout.dp * share != train.rows or not share:
        raise UpcycleError(
            f"the {train.rows} rows of a global batch do not divide among {layout.dp} groups of ranks; "
            f"change train.batch_tokens, train.batch_size or the layout"
        )
    precision: Precision = "mixed" if train.precision == "auto" else train.precision
    width = 2 if precision == "bfloat16" else 4
    beside = None if run.teacher is None or run.teacher.top_logits is not None else run.teacher
    lengths = _lengths_of(run, built)
    setting = Setting(
        built=built,
        layout=layout,
        lengths=lengths,
        precision=precision,
        recompute=train.activation_checkpointing,
        state=(run.optimizer.state_bytes(width), run.optimizer.state_bytes(width, outside=True)),
        update=functools.partial(run.optimizer.update_bytes, width=width),
        teacher=admit(peek(beside.source, label="teacher"), drop=beside.drop) if beside else None,
    )
    legs = [_of_leg(setting, leg) for leg in Course(run).legs]
    if train.micro_batch is not None:
        found = _of_rows(legs, min(train.micro_batch, share), share, gpus.find(gpu))
    else:
        found = _that_fits(legs, parts.sizes(run, built, lengths, share), gpus.find(gpu))
    if (left_out := run.optimizer.not_foretold) is None:
        return found
    said = (
        f"not counted: in each update optimizer.name = {run.optimizer.name} {left_out}, which takes traffic, "
        f"time, and memory of what is exchanged"
    )
    return replace(found, notes=(*found.notes, said))


def _of_rows(legs: Sequence[Setting], rows: int, share: int, gpu: Gpu) -> Outlook:
    """Return the forecast of the stage that needs the most memory.

    A rank has `share` rows of a step, and `rows` of them in a pass.
    """
    passes = -(-share // rows)
    found = [outlook.of(replace(leg, rows=rows, passes=passes), gpu) for leg in legs]
    return max(found, key=lambda each: each.peak.total)


def _that_fits(legs: Sequence[Setting], sizes: Sequence[int], gpu: Gpu) -> Outlook:
    """Return the forecast with as many rows in a pass as fit, and with the fewest if none fit.

    The last of `sizes` is all rows of a rank. `training/micro_batch.py` chooses among the same numbers.
    """
    share = sizes[-1]
    found = next((each for rows in reversed(sizes) if (each := _of_rows(legs, rows, share, gpu)).fits), None)
    if found is None:
        least = _of_rows(legs, sizes[0], share, gpu)
        said = f"no number of rows in a pass fits: the fewest, {sizes[0]}, need {size(least.peak.total)}"
        return replace(least, notes=(said,))
    if found.setting.rows == share:
        return found
    said = (
        f"{found.setting.rows} of a GPU's {share} rows in a pass are the most that fit; a run without "
        f"train.micro_batch chooses by the memory that it finds, and may take another number"
    )
    return replace(found, notes=(said,))


def _of_leg(setting: Setting, leg: Leg) -> Setting:
    """Return the step of a stage: what is trained in it, and whether masks keep its documents apart."""
    train = leg.run.train
    flash = (train.attn_implementation or "").startswith("flash")
    setting = replace(setting, masked=leg.run.data.isolate and not flash)
    if train.only is None and train.freeze is None:
        return setting
    from upcycle.training import rehearsal  # torch

    names, passes = rehearsal.trained(leg.run, setting.lengths)
    return replace(setting, trained=names, effort=passes)


def _refuse(layout: Layout, built: Blueprint, world: int) -> None:
    """Raise `UpcycleError` if a layout does not fit the world or the model."""
    config = built.dense.config
    heads = [config[n] for n in ("num_attention_heads", "num_key_value_heads") if config.get(n)]
    layout.refuse(world, experts=built.expert_counts, heads=heads, prefix="parallel.")
    built.target.refuse_layout(built.config, tp_size=layout.tp, ep_size=layout.ep)


def _lengths_of(run: Run, built: Blueprint) -> dict[str, int]:
    """Return the tokens of a row in each stack of blocks, as the run's task cuts them.

    Raises `UpcycleError` if they are more than the model has positions.
    """
    length, subject = run.train.sequence_length, Subject.of_dense(built.dense)
    task = tasks.fitting(run.task, subject.architecture)
    if (long := task.beyond_positions(length, subject)) is not None:
        raise UpcycleError(long)
    return task.lengths(length, subject)
