"""Draw the figures of this experiment from `results.json` and `tenth.json`, and print its tables.

The seconds of the runs are no measure, because other processes ran beside some of them. So a figure of
seconds takes the ratio of a step to a dense step from a benchmark, in which both took turns.

python experiments/code/figures.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import run  # noqa: E402
import tenth  # noqa: E402

import dense  # noqa: E402
from outcome import Outcome  # noqa: E402

BENCHMARK = HERE.parents[1] / "benchmarks" / "results" / "equal-flops-2-cores.json"
OF_EQUAL_FLOPS = ("virtual_group", "shuffle_slice")  # the experts of the benchmark


def seconds() -> dict[str, float]:
    """Return the seconds of a step relative to a dense step, of the variants of which they were measured."""
    steps = {each["hidden"]: each for each in json.loads(BENCHMARK.read_text())["steps"]}
    ratio = float(steps[dense.CONFIG["hidden_size"]]["moe_over_dense"]["median"])
    return {"dense": 1.0} | dict.fromkeys(OF_EQUAL_FLOPS, ratio)


def read() -> Outcome:
    """Return what is in `results.json`."""
    return Outcome.of(run.EXPERIMENT)


def main() -> None:
    """Draw every figure and print the tables."""
    found = read()
    found.report("tokens per parameter", "nats per token", highest=3.5)
    y = "held-out loss (nats per token)"
    found.draw_costs(HERE / "costs-320.png", 320, "From 320", y, seconds(), highest=3.5)
    Outcome.of(tenth.EXPERIMENT).report("tokens per parameter", "nats per token", name="tenth")


if __name__ == "__main__":
    main()
