"""`eval.json`: what a checkpoint scores, one entry for each thing scored. It lies beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from upcycle.records.reader import Document, Record, WrongError, sometimes


@dataclass(frozen=True, kw_only=True)
class MetricRecord(Record):
    """A number, and its standard error if one is known."""

    value: float
    standard_error: float | None = None
    higher_is_better: bool


@dataclass(frozen=True, kw_only=True)
class PairedSums(Record):
    """What a metric is made of, unit by unit [N]: the sum of `top` over the sum of `bottom`.

    Metrics of other checkpoints over the same units, which `units_sha256` tells, can be paired with it.
    """

    units: str | None = None
    units_sha256: str
    top: tuple[float, ...]
    bottom: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.top or len(self.top) != len(self.bottom):
            raise WrongError(f"and bottom have {len(self.top)} and {len(self.bottom)} units", "top")


@dataclass(frozen=True, kw_only=True)
class EvaluationEntry(Record):
    """One thing scored; the same kind and name scored again takes its place."""

    kind: str
    name: str
    data: Any = sometimes()  # what was scored, and how
    metrics: Mapping[str, MetricRecord]
    paired: Mapping[str, PairedSums] | None = sometimes()  # by metric
    versions: Mapping[str, str] | None = sometimes()
    date: str | None = sometimes()

    @property
    def place(self) -> tuple[str, str]:
        """What tells the entry from others of its file."""
        return self.kind, self.name


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(Document):
    """The scores of a checkpoint."""

    FILE: ClassVar[str] = "eval.json"

    format: int = Document.FORMAT
    results: tuple[EvaluationEntry, ...]
