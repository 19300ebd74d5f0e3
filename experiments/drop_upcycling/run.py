"""Drop-Upcycling's claim: when does it begin to pay to redraw a share r of every expert?

r = 0 is a copy. The script trains variants with both ways to choose the redrawn neurons and both balance
losses, with every seed, from one dense model, and gathers `results.json`; runs that are already there are not
repeated.

    python experiments/drop_upcycling/run.py --checkpoint stories260k --texts FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
import figure  # noqa: E402
import language  # noqa: E402

STEPS = 160
RATIOS = (0.1, 0.25, 0.5)
POOLED = {"router": {"balance_loss": "pooled"}}


def drop(ratio: float, indices: str = "shared") -> dict[str, Any]:
    """Return the recipe of eight experts with a share of their neurons redrawn."""
    return {**language.MOE, "init": {"name": "drop", "ratio": ratio, "indices": indices}}


PER_LAYER: dict[str, dict[str, Any]] = {
    "r0": drop(0.0),
    **{f"r{r:g}_{indices}": drop(r, indices) for r in RATIOS for indices in ("shared", "independent")},
    "r1": drop(1.0),
}
VARIANTS = PER_LAYER | {f"{name}_pooled": {**changes, **POOLED} for name, changes in PER_LAYER.items()}


def main() -> None:
    """Run the missing jobs, gather the results, and print the table."""
    given = language.options(__doc__, HERE)
    language.base(given)
    runs = common.gather(
        HERE / "results.json",
        [(name, seed) for seed in range(given.seeds) for name in VARIANTS],
        lambda name, seed: language.go(name, VARIANTS[name], seed, STEPS, given),
        list(VARIANTS),
        given.jobs,
        {"dense_training": language.base_curve(given)},
    )
    points = range(len(runs[0]["curve"]))
    print(f"{'step':18} " + " ".join(f"{runs[0]['curve'][p][0]:>15}" for p in points))
    for name in VARIANTS:
        told = [language.losses(runs, name, point) for point in points]
        print(f"{name:18} " + " ".join(f"{loss:7.4f} +-{error:6.4f}" for loss, error in told))
    shown = ("r0", "r0.1_shared", "r0.25_shared", "r0.5_shared", "r1")
    curves = {
        name: [[(step, loss) for step, _, loss in r["curve"]][1:] for r in runs if r["variant"] == name]
        for name in shown
    }
    y = "held-out loss (nats per token)"
    figure.write(HERE / "figure.png", "Share of neurons redrawn", curves, "steps of 2,048 tokens", y)


if __name__ == "__main__":
    main()
