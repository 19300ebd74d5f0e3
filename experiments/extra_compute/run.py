"""Sparse Upcycling's claim in a decoder: what does extra compute buy?

It compares a trained dense model, its upcycled version, and a Mixture of Experts from scratch, which has to
catch up. The script trains the dense model, then every variant with every seed, and gathers `results.json`;
runs that are already there are not repeated.

    python experiments/extra_compute/run.py --checkpoint stories260k --texts FOLDER
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
import figure  # noqa: E402
import language  # noqa: E402

# The variants that continue, and for how much of the dense model's own training FLOPs.
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "dense": ({}, 0.64),
    "upcycled": (language.MOE, 0.64),
    "scratch": ({**language.MOE, "from_scratch": True}, 1.28),
}


def reaches(curve: list[list[float]], loss: float) -> float | None:
    """Return the FLOPs at which a curve first falls to a loss, by linear interpolation; None: never."""
    for (_, before, high), (_, after, low) in pairwise(curve):
        if low <= loss:
            return before + (after - before) * max(0.0, high - loss) / max(1e-12, high - low)
    return None


def main() -> None:
    """Run the missing jobs, gather the results, and print the table."""
    given = language.options(__doc__, HERE)
    language.base(given)
    begun = language.base_curve(given)
    budget = begun[-1][1]
    steps = {
        name: round(share * budget / language.flops_per_step(changes, given))
        for name, (changes, share) in VARIANTS.items()
    }
    runs = common.gather(
        HERE / "results.json",
        [(name, seed) for seed in range(given.seeds) for name in VARIANTS],
        lambda name, seed: language.go(name, VARIANTS[name][0], seed, steps[name], given),
        list(VARIANTS),
        given.jobs,
        {"dense_training": begun},
    )
    print(f"dense model: held-out loss {begun[-1][2]:.4f} after {budget:.3g} FLOPs")
    scratch = [r["curve"] for r in runs if r["variant"] == "scratch"]
    for name in VARIANTS:
        curves = [r["curve"] for r in runs if r["variant"] == name]
        for point in range(len(curves[0])):
            loss, error = language.losses(runs, name, point)
            line = f"{name:10} {curves[0][point][1] / budget:7.1%} {loss:8.4f} +- {error:.4f}"
            if name == "upcycled":
                found = [reaches(curve, loss) for curve in scratch]
                told = ["not reached" if flops is None else f"{flops / budget:.0%}" for flops in found]
                line += f"   scratch: {', '.join(told)}"
            print(line)
    drawn = {
        name: [
            [(flops / budget, loss) for _, flops, loss in r["curve"]] for r in runs if r["variant"] == name
        ]
        for name in VARIANTS
    }
    drawn["scratch"] = [curve[1:] for curve in drawn["scratch"]]  # its first loss is far above
    x = "training FLOPs / those of the dense model"
    figure.write(HERE / "figure.png", "What extra compute buys", drawn, x, "held-out loss (nats per token)")


if __name__ == "__main__":
    main()
