"""Draws the result of `upcycle eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upcycle.cli.screen import err, grid, out


def show_scores(evaluation: dict[str, Any]) -> None:
    """Show one row for each metric of each checkpoint, then the differences, then the notes on them.

    The parts of a group are only in the JSON.
    """
    table = grid("", "checkpoint", "what", "metric", "value", "+-", "of")
    for score in evaluation["checkpoints"]:
        for result in _whole(score["results"]):
            of = f"{result['examples']}" if "examples" in result else ""
            for name, metric in result["metrics"].items():
                shown = (_number(metric["value"]), _number(metric["standard_error"]))
                table.add_row(score["checkpoint"], _what(result), name, *shown, of)
    out.print(table)
    if evaluation["differences"]:
        table = grid("", "checkpoint", "what", "metric", "difference", "+-", "of")
        for row in _whole(evaluation["differences"]):
            shown = (_number(row["difference"], sign=True), _number(row["standard_error"]))
            paired = f"{row['count']} {row['units']}"
            table.add_row(row["checkpoint"], _what(row), row["metric"], *shown, paired)
        out.print()
        out.print(table)
        out.print(f"differences are to {evaluation['differences'][0]['against']}, paired")
    for note in evaluation["notes"]:
        out.print(note)


def show_recorded(path: Path) -> None:
    """Show where the results were written."""
    err.print(f"written: {path}", soft_wrap=True)


def _whole(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "part_of" not in row]


def _what(row: dict[str, Any]) -> str:
    kinds = {"few_shot": "few-shot probe, ", "superglue": "SuperGLUE "}
    return kinds.get(row["kind"], "") + str(row["name"])


def _number(n: float | None, *, sign: bool = False) -> str:
    if n is None:
        return ""
    return (
        f"{n:{'+' if sign else ''}.4f}" if n == 0 or 1e-3 <= abs(n) < 1e5 else f"{n:{'+' if sign else ''}.1e}"
    )
