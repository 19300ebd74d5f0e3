"""Draw the figures of this experiment from `results.json`, and print its tables.

python experiments/code/figures.py
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import run  # noqa: E402
import table  # noqa: E402

import common  # noqa: E402
import dense  # noqa: E402
import figure  # noqa: E402

FLOPS, SECONDS, LOSS = 2, 3, 4  # columns of a curve

Runs = dict[tuple[int, str], list[dict[str, Any]]]  # by start and variant: one per seed


def read() -> Runs:
    """Return the runs of `results.json`."""
    runs: Runs = defaultdict(list)
    for result in json.loads(run.RESULTS.read_text())["runs"]:
        runs[result["start"], result["variant"]].append(result)
    return runs


def spent(runs: Runs, start: int) -> float:
    """Return the training FLOPs of a start; the dense continuation spends `table.EXTRA` of them."""
    steps, _, flops, *_ = runs[start, "dense"][0]["curve"][-1]
    return float(flops) / steps * dense.STARTS[start]


def share(runs: Runs, start: int, variant: str) -> list[np.ndarray]:
    """Return a curve for each seed: [points, (extra FLOPs relative to the start's, held-out loss)]."""
    unit = spent(runs, start)
    before = float(table.from_scratch(variant))  # a run from scratch spends the start's FLOPs as well
    curves = [np.array(each["curve"], np.float64) for each in runs[start, variant]]
    return [np.stack([each[:, FLOPS] / unit - before, each[:, LOSS]], axis=1) for each in curves]


def gap(runs: Runs, start: int, variant: str) -> tuple[float, float]:
    """Return mean and standard error of the final loss, less that of dense continuation, over the seeds."""
    ends = {each["seed"]: each["curve"][-1][LOSS] for each in runs[start, "dense"]}
    gaps = [each["curve"][-1][LOSS] - ends[each["seed"]] for each in runs[start, variant]]
    return common.mean_and_error(gaps)


def crossing(runs: Runs, start: int, variant: str) -> float | None:
    """Return the extra FLOPs, relative to the start's, from which the mean curve stays below the dense one.

    The dense curve is interpolated between its points; the answer is a point of the variant's. None if the
    variant ends above it.
    """
    theirs, ours = (np.mean(share(runs, start, name), axis=0) for name in ("dense", variant))
    below = ours[:, 1] < np.interp(ours[:, 0], theirs[:, 0], theirs[:, 1])
    if not below[-1]:
        return None
    above = np.flatnonzero(~below)
    return float(ours[above[-1] + 1 if len(above) else 0, 0])


def draw(runs: Runs, start: int, variants: Sequence[str]) -> None:
    """Draw the held-out loss of the variants of one start against extra FLOPs."""
    curves = {}
    for name in variants:
        curves[name] = [
            [(100 * x, y) for x, y in curve if x >= 0.01 or (x == 0 and y < 3.5)]
            for curve in share(runs, start, name)
        ]
    figure.write(
        HERE / f"start-{start}.png",
        f"From {start} tokens per parameter",
        curves,
        "extra training FLOPs (% of the dense model's)",
        "held-out loss (nats per token)",
    )


def draw_gaps(runs: Runs, starts: Sequence[int], variants: Sequence[str]) -> None:
    """Draw the final gap to dense continuation against the tokens per parameter of the start."""
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    for name in variants:
        seeds = min(len(runs[start, name]) for start in starts)
        ends = {start: [each["curve"][-1][LOSS] for each in runs[start, "dense"]] for start in starts}
        curves[name] = [
            [(start, runs[start, name][seed]["curve"][-1][LOSS] - ends[start][seed]) for start in starts]
            for seed in range(seeds)
        ]
    figure.write(
        HERE / "gaps.png",
        "The longer the dense model was trained",
        curves,
        "tokens per parameter of the start",
        "nats against dense, continued",
    )


def main() -> None:
    """Draw every figure and print the table of final losses."""
    runs = read()
    starts = sorted({start for start, _ in runs})
    print("| start | variant | seeds | loss at the start | at the end | less dense | crosses at |")
    print(f"{'|---' * 7}|")
    for start in starts:
        names = [name for name in table.VARIANTS if (start, name) in runs]
        draw(runs, start, [name for name in table.CORE if name in names])
        for name in names:
            each = runs[start, name]
            begins = common.mean_and_error([r["curve"][0][LOSS] for r in each])[0]
            ends, error = common.mean_and_error([r["curve"][-1][LOSS] for r in each])
            gaps, doubt = gap(runs, start, name)
            at = crossing(runs, start, name)
            crosses = "" if name == "dense" else "no" if at is None else f"{at:.0%}"
            around = [f" ± {e:.4f}" if len(each) > 1 else "" for e in (error, doubt)]  # unknown for one seed
            print(
                f"| {start} | {name} | {len(each)} | {begins:.3f} | {ends:.4f}{around[0]} "
                f"| {gaps:+.4f}{around[1]} | {crosses} |"
            )
    shared = [n for n in table.CORE if n != "dense" and all((start, n) in runs for start in starts)]
    if len(starts) > 1 and shared:
        draw_gaps(runs, starts, shared)


if __name__ == "__main__":
    main()
