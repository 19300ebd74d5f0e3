"""`run.json`: the settings and the model of a training run. It is in the folder of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from upcycle.errors import UpcycleError
from upcycle.records.provenance import refuse_other_recipe
from upcycle.records.reader import Document, Record, Table, WrongError, load, sometimes

_SECTIONS = ("train", "data")
_OPTIONAL_SECTIONS = ("moe", "init", "router", "task", "successor", "teacher")
_STAGE_SECTIONS = ("train", "data", "schedule", "router")  # of a [[stage]]


@dataclass(frozen=True, kw_only=True)
class StartedFrom(Record):
    """The dense checkpoint that a run starts from."""

    name: str
    path: str
    model_type: str


@dataclass(frozen=True, kw_only=True)
class StageCost(Record):
    """The cost of a step in one stage of a run."""

    first: int  # steps of the run before the stage
    training_flops_per_row: int

    def __post_init__(self) -> None:
        if self.training_flops_per_row < 1:
            raise WrongError(f"is {self.training_flops_per_row}, not 1 or more", "training_flops_per_row")


@dataclass(frozen=True, kw_only=True)
class RunRecord(Document):
    """A run: its run file, and the size and cost of its model."""

    FILE: ClassVar[str] = "run.json"

    format: int
    upcycle_version: str
    versions: Mapping[str, str]
    precision: str
    task: str
    tokens_per_row: int
    training_flops_per_row: int  # the mean over all steps
    training_flops_per_token: int  # likewise
    stage_costs: tuple[StageCost, ...] = sometimes(())  # in order; none: all steps cost the mean
    source: StartedFrom
    blueprint_hash: str | None
    architecture: str
    parameters: int
    active_parameters: int
    from_scratch: bool
    run: Table  # the run file
    recipe: Table | None = sometimes()  # with the numbers that the source adds; None: the run file has all
    begun_in: str | None = sometimes()  # the folder from which its relative paths count
    identity: Table  # settings that a resumed run must share with this one
    source_sha256: Mapping[str, Mapping[str, str]] | None = sometimes()  # keyed by checkpoint and file
    config_sha256: Mapping[str, Mapping[str, str]] | None = sometimes()  # keyed by checkpoint and key
    recipe_sha256: Mapping[str, str] | None = sometimes()  # of the recipe's files, keyed by key

    def __post_init__(self) -> None:
        for name in ("tokens_per_row", "training_flops_per_row", "parameters", "active_parameters"):
            if getattr(self, name) < 1:
                raise WrongError(f"is {getattr(self, name)}, not 1 or more", name)
        _refuse_other_order([cost.first for cost in self.stage_costs])
        refuse_other_sections(self.run)
        if self.recipe is not None:
            refuse_other_recipe(self.recipe)

    def training_flops(self, rows: float, batch: int) -> float:
        """Return the FLOPs of training on the first `rows` rows of the run, with `batch` rows a step.

        They are added up stage by stage. Records of older versions have the mean alone, which is exact at the
        end of the run. The last stage goes on for as long as there are rows.
        """
        if not self.stage_costs:
            return rows * self.training_flops_per_row
        starts = [cost.first * batch for cost in self.stage_costs]
        ends = [*starts[1:], math.inf]
        return sum(
            max(0, min(rows, end) - start) * cost.training_flops_per_row
            for cost, start, end in zip(self.stage_costs, starts, ends, strict=True)
        )


def _refuse_other_order(firsts: Sequence[int]) -> None:
    """Raise an error unless the first stage begins the run and each other one comes after the one before."""
    if firsts and firsts[0] != 0:
        raise WrongError(
            f"is {firsts[0]}, and the steps before the first stage are 0", "stage_costs", "0", "first"
        )
    for place, (before, first) in enumerate(pairwise(firsts), start=1):
        if first <= before:
            raise WrongError(f"is {first}, not after {before}", "stage_costs", str(place), "first")


def known_in(out: Path) -> RunRecord | None:
    """Return the record in the folder of a run; None if there is none, or a damaged one."""
    path = out / RunRecord.FILE
    if not path.exists():
        return None
    try:
        return RunRecord.of(load(path, ""), str(path))
    except UpcycleError:
        return None


def refuse_other_sections(run: Table) -> None:
    """Raise an error for a run file in which a section is not a table."""
    for name in (*_SECTIONS, *(name for name in _OPTIONAL_SECTIONS if name in run)):
        if not isinstance(run.get(name), Mapping):
            raise WrongError("is missing in it, or is not a table", "run", name)
    stages = run.get("stage", ())
    if not isinstance(stages, (list, tuple)) or not all(isinstance(stage, Mapping) for stage in stages):
        raise WrongError("is not a list of tables", "run", "stage")
    for number, stage in enumerate(stages):
        for name in _STAGE_SECTIONS:
            if name in stage and not isinstance(stage[name], Mapping):
                raise WrongError("is not a table", "run", "stage", str(number), name)
