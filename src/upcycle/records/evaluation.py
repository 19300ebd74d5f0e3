"""`eval.json`: the scores of a checkpoint, one entry per task or data set. It is beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from upcycle.records.reader import Document, Record, WrongError, sometimes


@dataclass(frozen=True, kw_only=True)
class MetricRecord(Record):
    """The value of a metric, and its standard error if it is known."""

    value: float
    standard_error: float | None = None
    higher_is_better: bool
    tokenizer: str | None = sometimes()  # a hash of that by whose tokens it counts; None: it counts by none


@dataclass(frozen=True, kw_only=True)
class PairedSums(Record):
    """The unit-wise sums [N] of a metric, whose value is sum(`top`) / sum(`bottom`).

    It can be paired with metrics of other checkpoints over the same units, which have the same
    `units_sha256`.
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
    """The scores on one task or data set; a new entry of the same kind and name replaces it."""

    kind: str
    name: str
    data: Any = sometimes()  # the data and settings of the scores
    metrics: Mapping[str, MetricRecord]
    paired: Mapping[str, PairedSums] | None = sometimes()  # keyed by metric
    versions: Mapping[str, str] | None = sometimes()
    date: str | None = sometimes()

    @property
    def place(self) -> tuple[str, str]:
        """The kind and name, which identify the entry in its file."""
        return self.kind, self.name


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(Document):
    """The scores of a checkpoint."""

    FILE: ClassVar[str] = "eval.json"

    format: int = Document.FORMAT
    results: tuple[EvaluationEntry, ...]
