"""The files beside the weights of a checkpoint, and the similarity of its experts.

A checkpoint is any folder with a config.json: exported from a run, converted, or dense.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from upcycle.errors import UpcycleError
from upcycle.evaluation import results
from upcycle.evaluation.differences import Sums
from upcycle.records.evaluation import EvaluationEntry, EvaluationRecord, MetricRecord
from upcycle.records.provenance import Provenance, Training
from upcycle.records.reader import DamagedError, Document, Table, load
from upcycle.records.routing import RoutingRecord
from upcycle.reporting.runs import fit, is_number

Kind = TypeVar("Kind", bound=Document)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one evaluation of a checkpoint; scores with equal `question` can be compared."""

    kind: str
    name: str
    data: str  # JSON: the data and settings
    metric: str
    value: float
    standard_error: float | None
    higher_is_better: bool
    sums: Sums | None = None  # sums by unit, if they can be paired with another model's
    units: str = ""  # a hash that identifies the units

    @property
    def question(self) -> tuple[str, str, str, str]:
        """The kind, name, data and metric of the score."""
        return self.kind, self.name, self.data, self.metric


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """A checkpoint: its provenance, its scores, and the statistics of its experts and routers."""

    name: str
    folder: Path
    made: Provenance | None
    scores: tuple[Score, ...]
    routing: RoutingRecord | None
    anatomy: Table | None  # None for a dense model
    damage: tuple[str, ...]

    @property
    def training(self) -> Training | None:
        """The training in its provenance that it was exported from; None if there is none."""
        last = self.made.training[-1] if self.made and self.made.training else None
        return last if last and last.run is not None else None

    @property
    def variant(self) -> str:
        """What was made of the run's weights, such as `mean of 3`; empty if they are those after its step."""
        training = self.training
        if training is None:
            return ""
        said = [] if training.expert is None else [f"expert {training.expert}"]
        if steps := training.averaged_steps:
            kind = "mean" if training.average_decay is None else "moving average"
            said.append(f"{kind} of {len(steps)}")
        return ", ".join(said)


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a model."""
    return (folder / "config.json").is_file()


def read_checkpoint(folder: Path, name: str) -> CheckpointRecord:
    """Read the checkpoint in `folder`, with its experts and all the files beside its weights."""
    damage: list[str] = []

    def attempt(read: Any) -> Any:
        try:
            return read()
        except (UpcycleError, OSError) as error:
            damage.append(str(error))
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            # An error from a damaged file must not end the report on the others.
            damage.append(f"something beside its weights is damaged ({type(error).__name__}: {error})")
        return None

    return CheckpointRecord(
        name=name,
        folder=folder,
        made=attempt(lambda: _read(Provenance, folder)),
        scores=attempt(lambda: _scores(folder)) or (),
        routing=attempt(lambda: _read(RoutingRecord, folder)),
        anatomy=attempt(lambda: _anatomy(folder)),
        damage=tuple(damage),
    )


def _anatomy(folder: Path) -> Table | None:
    """Return the similarity of the experts; None if there are none."""
    from upcycle.inspection import inspect

    found = fit(inspect(folder), Provenance.FILE)
    return found if any(layer["num_experts"] for layer in found["layers"]) else None


def _read(kind: type[Kind], folder: Path) -> Kind | None:
    """Read a document beside the weights, with texts made safe to show; None if it does not exist."""
    path = folder / kind.FILE
    if not path.exists():
        return None
    return kind.of(fit(load(path, f"it has no {path.name}", path.name), path.name), path.name)


def _scores(folder: Path) -> tuple[Score, ...]:
    """Read the finite numbers in eval.json."""
    try:
        found = _read(EvaluationRecord, folder)
    except DamagedError as error:
        raise UpcycleError(f"{error}; run `upcycle eval` again") from None
    return tuple(
        _score(entry, name, metric)
        for entry in (found.results if found else ())
        for name, metric in entry.metrics.items()
        if math.isfinite(metric.value)
    )


def _score(entry: EvaluationEntry, name: str, metric: MetricRecord) -> Score:
    paired = (entry.paired or {}).get(name)
    error = metric.standard_error
    data = dict(entry.data) if isinstance(entry.data, Mapping) else {"": entry.data}
    if metric.tokenizer is not None:  # what is counted by the tokens of another is another question
        data["tokenizer"] = metric.tokenizer
    return Score(
        kind=entry.kind,
        name=entry.name,
        data=json.dumps(data, sort_keys=True),
        metric=name,
        value=metric.value,
        standard_error=error if is_number(error) else None,
        higher_is_better=metric.higher_is_better,
        sums=results.sums_of(paired),
        units="" if paired is None else paired.units_sha256,
    )
