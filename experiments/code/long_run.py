"""Writes the curves that `upcycle demo` shows beside its own short training: those from its start, for 30 %.

python experiments/code/long_run.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import figures  # noqa: E402

START = 320  # tokens per parameter that the model of the demo has seen
WAYS = {"dense": "dense", "granular": "shuffle_slice", "copy": "copy"}  # the demo's names, and those here
OUT = HERE.parents[1] / "src" / "upcycle" / "demo" / "long_run.json"


def found() -> dict[str, Any]:
    """Return the mean held-out losses of the seeds after shares of the start's training FLOPs, in per cent.

    All variants are evaluated at the same shares, up to a step. The last point but one is left out if it lies
    a few steps before the last.
    """
    outcome = figures.read()
    curves = {name: np.stack([*outcome.share(START, ours).values()]) for name, ours in WAYS.items()}
    extra = curves["dense"][0, :, 0]
    kept = [point for point in range(len(extra)) if point + 2 != len(extra) or extra[-1] - extra[-2] > 0.005]
    for name, curve in curves.items():
        if not np.allclose(curve[:, :, 0], extra, atol=5e-4):
            sys.exit(f"{name} was evaluated at other shares than dense; the demo shows them in one table")
    return {
        "seen": START,
        "seeds": len(curves["dense"]),
        "start_flops": outcome.spent(START),
        "extra": [round(100 * x, 1) for x in extra[kept].tolist()],
        "losses": {
            name: [round(loss, 4) for loss in curve[:, kept, 1].mean(0).tolist()]
            for name, curve in curves.items()
        },
    }


if __name__ == "__main__":
    OUT.write_text(json.dumps(found()) + "\n")
