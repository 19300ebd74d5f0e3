"""The comparison of several checkpoints on the same data: each with the first one, unit by unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from upcycle.evaluation.differences import difference
from upcycle.evaluation.results import Kind, Metric, Result
from upcycle.evaluation.scores import Scored

BITS = "bits_per_byte"


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """A metric of a checkpoint minus that of the first one, over the units that both were scored on."""

    checkpoint: str
    against: str  # the first checkpoint
    kind: Kind
    name: str  # the task or data set
    metric: str
    difference: float
    standard_error: float | None  # None: too few units to estimate it
    higher_is_better: bool
    units: str  # a noun in the plural, such as "documents"
    count: int  # of units
    part_of: str | None = None  # the group of tasks that the task belongs to

    def as_json(self) -> dict[str, Any]:
        """Return the difference as JSON; `part_of` is left out if there is no group."""
        found = asdict(self)
        return {key: value for key, value in found.items() if key != "part_of" or value is not None}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The differences of checkpoints from the first one, and the reasons why results were not compared."""

    differences: tuple[PairedDifference, ...]
    notes: tuple[str, ...]


def compare(scored: Sequence[Scored]) -> Compared:
    """Compare the other checkpoints with the first, metric by metric.

    Metrics per token are left out if the tokenizers differ, and `notes` says so.
    """
    differences: list[PairedDifference] = []
    notes: list[str] = []
    for other in scored[1:]:
        rows, reasons = _against(scored[0], other)
        if note := _of_tokenizers(scored[0], other, rows):
            notes.append(note)
        differences += rows
        notes += reasons
    return Compared(differences=tuple(differences), notes=tuple(notes))


def _matched(first: Scored, other: Scored) -> Iterator[tuple[Result, Result]]:
    """Yield the results of both checkpoints on the same task or data set."""
    theirs = {(result.kind, result.name): result for result in other.results}
    for result in first.results:
        if (match := theirs.get((result.kind, result.name))) is not None:
            yield result, match


def _against(first: Scored, other: Scored) -> tuple[list[PairedDifference], list[str]]:
    """Return the differences of a checkpoint from the first, and why results are not compared."""
    rows: list[PairedDifference] = []
    reasons: list[str] = []
    alike = first.tokenizer == other.tokenizer
    for result, match in _matched(first, other):
        if result.units != match.units:
            reasons.append(_why_not(result, alike=alike))
            continue
        for name, one, two in _paired(result, match, alike=alike):
            assert one.sums is not None
            assert two.sums is not None
            found = difference(two.sums, one.sums)
            rows.append(
                PairedDifference(
                    checkpoint=other.checkpoint, against=first.checkpoint, kind=result.kind, name=result.name,
                    metric=name, difference=found.value, standard_error=found.standard_error,
                    higher_is_better=one.higher_is_better, units=found.units, count=found.count,
                    part_of=result.more.get("part_of"),
                )
            )  # fmt: skip
    return rows, reasons


def _of_tokenizers(first: Scored, other: Scored, rows: Sequence[PairedDifference]) -> str | None:
    """Return a note if metrics count by token and the tokenizers differ; `rows` are the differences."""
    by_token = {n: None for r in first.results for n, metric in r.metrics.items() if metric.per_token}
    if first.tokenizer == other.tokenizer or not by_token:
        return None
    both = sum(BITS in r.metrics and BITS in match.metrics for r, match in _matched(first, other))
    instead = "; bits per byte can" if both else ""
    if both and sum(row.metric == BITS for row in rows) == both:
        instead += ", and are"
    return (
        f"{first.checkpoint} and {other.checkpoint} have different tokenizers: what counts by token "
        f"({', '.join(by_token)}) cannot be compared{instead}"
    )


def _paired(result: Result, match: Result, *, alike: bool) -> Iterator[tuple[str, Metric, Metric]]:
    """Yield the metrics that both results have and that are computed over the same units."""
    for name, one in result.metrics.items():
        two = match.metrics.get(name)
        if two is None or one.sums is None or two.sums is None or (one.per_token and not alike):
            continue
        yield name, one, two


def _why_not(result: Result, *, alike: bool) -> str:
    """Return the reason why two results are not compared."""
    if result.kind == "text" and not alike and result.data.get("limit"):
        return (
            f"{result.name}: under --limit the two tokenizers end at other places of the text; leave it out "
            f"to compare"
        )
    return f"{result.name}: the two checkpoints were scored on other examples and are not compared"
