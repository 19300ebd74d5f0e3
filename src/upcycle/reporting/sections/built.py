"""The section on models: their provenance, parameters and FLOPs."""

from __future__ import annotations

from upcycle import targets
from upcycle.errors import listed
from upcycle.records.provenance import Training
from upcycle.reporting import formats
from upcycle.reporting.checkpoints import CheckpointRecord
from upcycle.reporting.document import Block, Section, Table
from upcycle.reporting.runs import RunHistory
from upcycle.reporting.study import Study


def section(study: Study) -> Section:
    """Return the section on models, runs and checkpoints."""
    blocks: list[Block] = []
    if study.groups:
        blocks.append(_models(study))
    if study.runs:
        blocks.append(_runs(study))
    if study.checkpoints:
        blocks.append(_checkpoints(study))
    return Section(name="built", title="What was built from what", blocks=tuple(blocks))


def _models(study: Study) -> Table:
    rows = []
    for group in study.groups:
        about = group.runs[0].about
        rows.append(
            (
                group.label,
                about.source.name,
                about.architecture,
                formats.count(about.parameters),
                formats.count(about.active_parameters),
                formats.flops(about.training_flops_per_row / about.tokens_per_row),
                str(len(group.runs)),
            )
        )
    return Table(
        caption="Models",
        head=(
            "model", "made from", "class", "parameters", "active per token", "training FLOPs per token",
            "seeds",
        ),
        rows=tuple(rows),
        left=3,
        note="FLOPs are three forward passes' worth: matrix products of the weights that a token meets, and "
        "attention scores. A step that trains a part costs less; of stages, this is the mean over all steps.",
    )  # fmt: skip


def _runs(study: Study) -> Table:
    group_of = {id(run): group.label for group in study.groups for run in group.runs}
    rows = [
        (
            run.name,
            group_of.get(id(run), "not compared"),
            (run.about.blueprint_hash or formats.MISSING)[:12],
            str(run.seed),
            f"{run.done:,} of {run.total_steps:,}",
            formats.count(run.done * run.tokens_per_step),
            formats.flops(float(run.flops(run.done * run.tokens_per_step))),  # type: ignore[arg-type]
        )
        for run in study.runs
    ]
    return Table(
        caption="Runs",
        head=("run", "model", "blueprint", "seed", "steps", "tokens", "training FLOPs"),
        rows=tuple(rows),
        left=3,
        note="Made with "
        + "; ".join(f"{how} ({names})" for how, names in _versions(study.runs).items())
        + ".",
    )


def _versions(runs: tuple[RunHistory, ...]) -> dict[str, str]:
    """Return the versions and precisions, with the names of the runs that used them."""
    found: dict[str, list[str]] = {}
    for run in runs:
        about = run.about
        torch = about.versions.get("torch", "?")
        how = f"upcycle {about.upcycle_version}, torch {torch}, {about.precision}"
        found.setdefault(how, []).append(run.name)
    return {how: "all runs" if len(found) == 1 else listed(names, 8) for how, names in found.items()}


def _checkpoints(study: Study) -> Table:
    label_of = {c.name: column.label for column in study.columns() for c in column.checkpoints}
    return Table(
        caption="Checkpoints",
        head=("checkpoint", "model", "made from", "recipe", "blueprint", "step", "trained on, tokens"),
        rows=tuple((c.name, label_of[c.name], *_origin(c)) for c in study.checkpoints),
        left=5,
    )


def _origin(checkpoint: CheckpointRecord) -> tuple[str, ...]:
    made = checkpoint.made
    if made is None:
        return ("not known: no upcycle.json", *[formats.MISSING] * 4)
    how = formats.MISSING
    if made.recipe is not None:
        target = targets.recorded(made.recipe["moe"])
        how = target.label(made.recipe)
        if target.has_experts:
            how = f"{how}, {target.way(made.recipe)}"
    training = checkpoint.training
    if training is not None and training.expert is not None:
        how = f"expert {training.expert} of each layer"
    return (
        made.source.name,
        how,
        (made.blueprint_hash or formats.MISSING)[:12],
        _step(training) if training else "0",
        formats.count(training.tokens) if training else "0",
    )


def _step(training: Training) -> str:
    """Return the last step that the weights are of, with the others if they are a mean."""
    if not training.averaged_steps:
        return str(training.step)
    decay = training.average_decay
    kind = "mean of" if decay is None else f"moving average with decay {decay:g} of"
    return f"{training.step} ({kind} {listed([*map(str, training.averaged_steps)], 8)})"
