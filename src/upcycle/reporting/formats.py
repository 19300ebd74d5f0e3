"""Formatting of numbers in a report."""

from __future__ import annotations

import math

from upcycle.system.wording import count, size

UNITS = {
    "causal_lm": "nats per token",
    "sft": "nats per token of the assistant",
    "masked_lm": "nats per masked token",
    "span_corruption": "nats per target token",
    "image_classification": "nats per image",
    "text_classification": "nats per text",
}
MISSING = "–"

__all__ = ["MISSING", "UNITS", "count", "duration", "flops", "loss", "percent", "signed", "size", "unit"]


def unit(task: str) -> str:
    """Return the unit of a loss of the task."""
    return UNITS.get(task, "nats")


def flops(value: float | None) -> str:
    """Format FLOPs, such as 1.23e15."""
    if value is None:
        return MISSING
    return "0" if value == 0 else f"{value:.3g}" if abs(value) < 1e4 else f"{value:.2e}".replace("e+", "e")


def duration(seconds: float) -> str:
    """Format a duration, such as 31 s, 2.4 min or 3.1 h."""
    for length, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.0f} s"


def loss(value: float, error: float | None = None, digits: int = 4) -> str:
    """Format a number, with its standard error if there is one."""
    if not math.isfinite(value):
        return MISSING
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def signed(value: float, error: float | None = None) -> str:
    """Format a difference with its sign."""
    return f"{value:+.4f}".replace("-", "−") + ("" if error is None else f" ± {error:.4f}")


def percent(value: float, error: float | None = None) -> str:
    """Format a share as a percentage."""
    if not math.isfinite(value):
        return MISSING
    return f"{value:.2%}" + ("" if error is None else f" ± {error:.2%}")
