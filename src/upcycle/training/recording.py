"""run.json of a run that begins or goes on: its description for later readers of its folder."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import torch

import upcycle
from upcycle.errors import UpcycleError
from upcycle.records.run import RunRecord, StartedFrom
from upcycle.records.state import RunState
from upcycle.training import effort, run_folder
from upcycle.training.anatomy import Anatomy
from upcycle.training.course import Course
from upcycle.training.step import Trainee


def write(trainee: Trainee, course: Course, anatomy: Anatomy | None, out: Path, state: RunState) -> None:
    """Write run.json, unless this run's is already there."""
    run = course.run
    identity = json.loads(json.dumps(run.identity()))
    try:
        same = run_folder.read_record(out).identity == identity
    except UpcycleError:
        same = False
    if not state.step or not same:
        run_folder.write_record(out, _record(trainee, course, anatomy, state))


def _record(trainee: Trainee, course: Course, anatomy: Anatomy | None, state: RunState) -> RunRecord:
    """Return the content of run.json."""
    begun, task, run = trainee.start, trainee.task, course.run
    lengths = trainee.lengths
    flops = effort.mean_flops_per_row(begun, anatomy, course, lengths)
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
        source=StartedFrom(
            name=source.name, path=str(source.folder.resolve()), model_type=begun.dense.family.model_type
        ),
        blueprint_hash=begun.built.hash if begun.built else None,
        architecture=begun.architecture,
        parameters=begun.parameters,
        active_parameters=begun.active_parameters,
        from_scratch=begun.from_scratch,
        run=run.as_table(),
        identity=run.identity(),
        source_sha256=state.source_sha256,
    )
