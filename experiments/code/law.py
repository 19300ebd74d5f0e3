"""Fit the scaling law of Liew et al. 2025 (arXiv 2502.03009) to the runs of `results.json`, and print it.

The form is L = A D1^-a1 D2^(-a2 + a3 ln D1) + E, with D1 the tokens of the dense model and D2 those of the
MoE made from it. The number of parameters is the same in all runs, so its term is part of E. The fit takes
the points before the rate falls, because points at other rates are of other curves. With E given the law is
linear in the logarithms, so E is searched and the rest solved. Errors are of leaving out one seed
(jackknife). The last column of the table is an extrapolation: the law without the runs of the longest start,
at these runs.

    python experiments/code/law.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import figures  # noqa: E402
from run import EXPERIMENT  # noqa: E402

import common  # noqa: E402
import dense  # noqa: E402

TOKENS, LOSS = 1, 4  # columns of a curve


@dataclass(frozen=True)
class Law:
    """The constants of the law, in the order ln A, a1, a2, a3, and E in nats per token."""

    constants: np.ndarray
    floor: float

    def __call__(self, d1: np.ndarray, d2: np.ndarray) -> np.ndarray:
        """Return the losses after `d1` and `d2` tokens."""
        loss: np.ndarray = np.exp(terms(d1, d2) @ self.constants) + self.floor
        return loss


def terms(d1: np.ndarray, d2: np.ndarray) -> np.ndarray:
    """Return what the constants are multiplied with: [points, 4]."""
    x, y = np.log(d1), np.log(d2)
    return np.stack([np.ones_like(x), -x, -y, x * y], axis=1)


def points(runs: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return (D1, D2, loss) of the points after the first, before the rate falls: [points, 3]."""
    found = []
    for each in runs:
        last = each["curve"][-1][0]
        before = last - EXPERIMENT.falling(each["variant"]) * last
        d1 = dense.STARTS[each["start"]] * dense.BATCH
        found += [(d1, p[TOKENS], p[LOSS]) for p in each["curve"][1:] if p[0] <= before]
    return np.array(found, np.float64)


def fit(given: np.ndarray) -> Law:
    """Return the law with the least squared error in the logarithm of the loss above E."""
    d1, d2, loss = given.T
    best, law = np.inf, None
    for floor in np.linspace(0, loss.min() - 0.01, 200):
        wanted = np.log(loss - floor)
        constants = np.linalg.lstsq(terms(d1, d2), wanted, rcond=None)[0]
        found = Law(constants, float(floor))
        if (error := float(np.mean((found(d1, d2) - loss) ** 2))) < best:
            best, law = error, found
    assert law is not None
    return law


def off(law: Law, given: np.ndarray) -> float:
    """Return the root mean square of the law's error at points, in nats per token."""
    return float(np.sqrt(np.mean((law(given[:, 0], given[:, 1]) - given[:, 2]) ** 2)))


def jackknife(runs: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[float]:
    """Return the errors of the constants and of E, by leaving out one of the seeds."""
    left = [fit(points([run for run in runs if run["seed"] != seed])) for seed in seeds]
    each = np.array([[*other.constants, other.floor] for other in left])
    errors = np.sqrt((len(seeds) - 1) / len(seeds) * ((each - each.mean(0)) ** 2).sum(0))
    return [float(error) for error in errors]


def table() -> list[str]:
    """Fit each variant of the core, and return a table of constants, errors and an extrapolation.

    A variant that has run from fewer than two starts is left out, and one seed has no errors.
    """
    runs = figures.read()
    lines = [
        "| variant | ln A | a1 | a2 | a3 | E | rms error | rms error at the longest start, left out |",
        f"{'|---' * 8}|",
    ]
    for variant in ("dense", "copy", "virtual_group", "shuffle_slice", "drop_0.5"):
        starts = [start for start in runs.starts if (start, variant) in runs]
        if len(starts) < 2:
            continue
        own = [run for start in starts for run in runs[start, variant]]
        seeds = sorted({run["seed"] for run in own})
        law = fit(points(own))
        values = [*law.constants, law.floor]
        errors = jackknife(own, seeds) if len(seeds) > 1 else [None] * len(values)
        shown = " | ".join(
            f"{v:.3g}" + common.error_text(e, " ± {:.2g}") for v, e in zip(values, errors, strict=True)
        )
        near = [run for run in own if run["start"] != starts[-1]]
        far = points([run for run in own if run["start"] == starts[-1]])
        beyond = f"{off(fit(points(near)), far):.3f}" if len(starts) > 2 else ""
        lines.append(f"| {variant} | {shown} | {off(law, points(own)):.4f} | {beyond} |")
    return lines


if __name__ == "__main__":
    print(*table(), sep="\n")
