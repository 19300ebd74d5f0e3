"""Words for how the rows of routers lie to one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from upcycle.system.wording import place_of

_MOST = 8  # experts whose matrix of cosines is shown


def rows_apart(cosine: Sequence[Sequence[float]], *, short: bool = False) -> str:
    """Return mean, least and largest cosine of pairs of rows; nothing for a router of one row."""
    pairs = [value for i, line in enumerate(cosine) for value in line[:i]]
    if not pairs:
        return ""
    mean, low, high = sum(pairs) / len(pairs), min(pairs), max(pairs)
    return f"{mean:.2f} (..{high:.2f})" if short else f"{mean:.4f} ({low:.4f}..{high:.4f})"


def condition(value: float | None) -> str:
    """Return a condition number; `inf` for rows that depend on one another."""
    return "inf" if value is None else f"{value:.3g}"


def routers_said(routers: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each router, and its matrix of cosines if that is small."""
    for row in routers:
        yield (
            f"router of layer {place_of(row['stack'], row['layer'])}: cosine between rows "
            f"{rows_apart(row['cosine'])}, condition {condition(row['condition'])}, "
            f"{condition(row['spread'])} without what rows have in common"
        )
        if len(row["cosine"]) <= _MOST:
            yield from ("    " + " ".join(f"{value:7.3f}" for value in line) for line in row["cosine"])
