"""The measurements of our own runs (experiments/code): upcycling beside dense continuation, at equal FLOPs.

A Llama of 312 thousand parameters was trained on Python code at a constant rate. It, and a Mixture of Experts
made from it, went on for 30 % of what it had cost, and the rate fell to zero in the last quarter. A test
compares the table with the results that the experiment recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

from upcycle.advice.comparison import Comparison
from upcycle.advice.experts import Experts

SOURCE = "upcycle's own runs (experiments/code)"
SIZE = 312e3  # parameters of the dense model
EXTRA = 0.3  # FLOPs after the start, as a share of the start's

_COPIES = Experts(count=8, top_k=2, granularity=1, layers="all", routers=("top_k",))
_HALVES = Experts(count=16, top_k=2, granularity=2, layers="all", routers=("top_k",))
EXPERTS = {"virtual_group": _HALVES, "copy": _COPIES, "drop_0.5": _COPIES}
SAID = {
    "virtual_group": "16 experts of half the width, top-2, at the dense FLOPs a token",
    "copy": "8 copies, top-2",
    "drop_0.5": "8 experts, top-2, half of each redrawn",
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The held-out loss of a variant less that of dense continuation, in nats: mean and standard error of
    three seeds. `ahead` is the share of the start's FLOPs from which it stays below; None: it does not."""

    trained: float  # tokens per parameter that the dense model had seen
    variant: str
    less_dense: float
    error: float
    ahead: float | None


MEASURED = (
    Measured(trained=10, variant="virtual_group", less_dense=+0.0103, error=0.0034, ahead=None),
    Measured(trained=10, variant="copy", less_dense=+0.0490, error=0.0059, ahead=None),
    Measured(trained=10, variant="drop_0.5", less_dense=+0.0809, error=0.0044, ahead=None),
    Measured(trained=40, variant="virtual_group", less_dense=-0.0271, error=0.0052, ahead=0.19),
    Measured(trained=40, variant="copy", less_dense=-0.0036, error=0.0010, ahead=0.28),
    Measured(trained=40, variant="drop_0.5", less_dense=+0.0080, error=0.0070, ahead=None),
    Measured(trained=80, variant="virtual_group", less_dense=-0.0466, error=0.0031, ahead=0.13),
    Measured(trained=80, variant="copy", less_dense=-0.0330, error=0.0039, ahead=0.13),
    Measured(trained=80, variant="drop_0.5", less_dense=-0.0280, error=0.0012, ahead=0.20),
)


def _comparison(measured: Measured) -> Comparison:
    ahead = measured.ahead
    at = "behind to the end" if ahead is None else f"ahead from {ahead:.0%} on"
    return Comparison(
        paper=SOURCE,
        kind="decoder",
        inits=(measured.variant.partition("_0")[0],),
        sizes=(SIZE, SIZE),
        experts=EXPERTS[measured.variant],
        share=(ahead or 0.0, EXTRA),
        trained=(measured.trained, measured.trained),
        better="dense continuation" if ahead is None else "upcycling",
        found=f"a Llama of 312 k parameters after {measured.trained:g} tokens per parameter, "
        f"{SAID[measured.variant]}: {measured.less_dense:+.3f} ± {measured.error:.3f} nats against dense "
        f"continuation after {EXTRA:.0%} more FLOPs, {at}",
    )


COMPARISONS = tuple(map(_comparison, MEASURED))
