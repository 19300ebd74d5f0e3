"""run.json of a run that begins or goes on: its description for later readers of its folder."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import torch

import upcycle
from upcycle.blueprints.blueprint import Blueprint
from upcycle.records.reader import Table
from upcycle.records.run import RunRecord, StartedFrom, known_in
from upcycle.training import begun_in, beside, effort, run_folder
from upcycle.training.beginning import Ready
from upcycle.training.run import Run


def write(ready: Ready, out: Path) -> None:
    """Write run.json, unless this run's is there, at this place. A new run keeps what goes with its model."""
    run, state = ready.course.run, ready.state
    if not state.step:
        beside.keep(run, ready.trainee.task, out)
    identity = json.loads(json.dumps(run.identity()))
    before = known_in(out)
    folder = begun_in.to_record(before, out)
    known = before is not None and (before.identity, before.begun_in) == (identity, folder)
    if not state.step or not known:
        run_folder.write_record(out, _record(ready, folder))


def _record(ready: Ready, folder: str | None) -> RunRecord:
    """Return the content of run.json. `folder` is that from which the paths of the run file count."""
    trainee, run, state = ready.trainee, ready.course.run, ready.state
    begun, task = trainee.start, trainee.task
    lengths = trainee.lengths
    costs = effort.stage_costs(begun, ready.anatomy, ready.course, lengths)
    flops = effort.mean(costs, ready.course)
    source = begun.dense.checkpoint
    return RunRecord(
        format=RunRecord.FORMAT,
        upcycle_version=upcycle.__version__,
        versions={
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        precision=trainee.precision,
        task=task.name,
        tokens_per_row=sum(lengths.values()),
        training_flops_per_row=flops,
        training_flops_per_token=flops // sum(lengths.values()),
        stage_costs=costs if run.stage else (),
        source=StartedFrom(
            name=source.name, path=str(source.folder.resolve()), model_type=begun.dense.family.model_type
        ),
        blueprint_hash=begun.built.hash if begun.built else None,
        architecture=begun.architecture,
        parameters=begun.parameters,
        active_parameters=begun.active_parameters,
        from_scratch=begun.from_scratch,
        run=run.as_table(),
        recipe=_settled(run, begun.built),
        begun_in=folder,
        identity=run.identity(),
        source_sha256=state.source_sha256,
        config_sha256=state.config_sha256,
        recipe_sha256=state.recipe_sha256,
    )


def _settled(run: Run, built: Blueprint | None) -> Table | None:
    """Return the recipe of the model if it has numbers that the run file leaves to the source."""
    return None if built is None or built.recipe == run.recipe else built.recipe.as_table()
