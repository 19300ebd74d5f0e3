"""The comparison of several checkpoints on the same data: each with the first one, unit by unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from upcycle.evaluation.differences import difference
from upcycle.evaluation.results import Metric, Result
from upcycle.evaluation.scores import Scored


def compare(scored: Sequence[Scored]) -> dict[str, Any]:
    """Compare the other checkpoints with the first, metric by metric, and return JSON.

    `difference` is the value of the other checkpoint minus that of the first, with the standard error over
    their common units. Metrics per token are left out if the tokenizers differ, and `notes` says so.
    """
    differences, notes = [], []
    first = scored[0]
    for other in scored[1:]:
        alike = first.tokenizer == other.tokenizer
        if not alike and any(m.per_token for r in first.results for m in r.metrics.values()):
            notes.append(
                f"{first.checkpoint} and {other.checkpoint} have different tokenizers: loss, perplexity and "
                f"accuracy count by token and cannot be compared; bits per byte can, and are"
            )
        theirs = {(result.kind, result.name): result for result in other.results}
        for result in first.results:
            match = theirs.get((result.kind, result.name))
            if match is None:
                continue
            if result.units != match.units:
                notes.append(_why_not(result, alike=alike))
                continue
            for name, one, two in _paired(result, match, alike=alike):
                differences.append(
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
    return {"differences": differences, "notes": notes}


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
    if result.kind == "text" and not alike:
        return (
            f"{result.name}: under --limit the two tokenizers end at other places of the text; leave it out "
            f"to compare"
        )
    return f"{result.name}: the two checkpoints were scored on other examples and are not compared"
