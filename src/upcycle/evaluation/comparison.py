"""The comparison of several checkpoints on the same data: each with the first one, unit by unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from upcycle.evaluation.differences import difference
from upcycle.evaluation.results import Metric, Result
from upcycle.evaluation.scores import Scored

BITS = "bits_per_byte"


def compare(scored: Sequence[Scored]) -> dict[str, Any]:
    """Compare the other checkpoints with the first, metric by metric, and return JSON.

    `difference` is the value of the other checkpoint minus that of the first, with the standard error over
    their common units. Metrics per token are left out if the tokenizers differ, and `notes` says so.
    """
    differences: list[dict[str, Any]] = []
    notes: list[str] = []
    for other in scored[1:]:
        rows, reasons = _against(scored[0], other)
        if note := _of_tokenizers(scored[0], other, rows):
            notes.append(note)
        differences += rows
        notes += reasons
    return {"differences": differences, "notes": notes}


def _matched(first: Scored, other: Scored) -> Iterator[tuple[Result, Result]]:
    """Yield the results of both checkpoints on the same task or data set."""
    theirs = {(result.kind, result.name): result for result in other.results}
    for result in first.results:
        if (match := theirs.get((result.kind, result.name))) is not None:
            yield result, match


def _against(first: Scored, other: Scored) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the differences of a checkpoint from the first, and why results are not compared."""
    rows, reasons, alike = [], [], first.tokenizer == other.tokenizer
    for result, match in _matched(first, other):
        if result.units != match.units:
            reasons.append(_why_not(result, alike=alike))
            continue
        for name, one, two in _paired(result, match, alike=alike):
            rows.append(
                {
                    "checkpoint": other.checkpoint,
                    "against": first.checkpoint,
                    "kind": result.kind,
                    "name": result.name,
                    "metric": name,
                    **_difference(one, two),
                    **{key: result.more[key] for key in ("part_of",) if key in result.more},
                }
            )
    return rows, reasons


def _of_tokenizers(first: Scored, other: Scored, rows: Sequence[dict[str, Any]]) -> str | None:
    """Return a note if metrics count by token and the tokenizers differ; `rows` are the differences."""
    by_token = {n: None for r in first.results for n, metric in r.metrics.items() if metric.per_token}
    if first.tokenizer == other.tokenizer or not by_token:
        return None
    both = sum(BITS in r.metrics and BITS in match.metrics for r, match in _matched(first, other))
    instead = "; bits per byte can" if both else ""
    if both and sum(row["metric"] == BITS for row in rows) == both:
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


def _difference(one: Metric, two: Metric) -> dict[str, Any]:
    assert one.sums is not None
    assert two.sums is not None
    found = difference(two.sums, one.sums)
    return {
        "difference": found.value,
        "standard_error": found.standard_error,
        "higher_is_better": one.higher_is_better,
        "units": found.units,
        "count": found.count,
    }


def _why_not(result: Result, *, alike: bool) -> str:
    """Return the reason why two results are not compared."""
    if result.kind == "text" and not alike and result.data.get("limit"):
        return (
            f"{result.name}: under --limit the two tokenizers end at other places of the text; leave it out "
            f"to compare"
        )
    return f"{result.name}: the two checkpoints were scored on other examples and are not compared"
