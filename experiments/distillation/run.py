"""How many tokens does a converted model need to come back to the dense one, with and without a teacher?

The script trains every variant with every seed and gathers `results.json`. Runs that are there are not
repeated, and a run that was stopped goes on from its last checkpoint.

    python experiments/distillation/run.py --checkpoint stories260k --text tinystories.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from upcycle.recipe import read_toml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402

NEAR = 0.02  # nats above the dense model
STARTS: dict[str, dict[str, Any]] = {
    "drop": {"moe": {"num_experts": 8, "top_k": 2}, "init": {"name": "drop", "ratio": 0.5}},
    "split": {"moe": {"num_experts": 4, "top_k": 2, "granularity": 4}, "init": {"name": "split"}},
    "narrow": {
        "moe": {"num_experts": 8, "top_k": 2}, "init": {"name": "random"},
        "successor": {"hidden_size": 48, "intermediate_size": 128},
    },
}  # fmt: skip
TAUGHT: dict[str, dict[str, Any] | None] = {
    "alone": None,
    "teacher": {"weight": 1.0},
}
VARIANTS = {f"{start}, {taught}": (start, taught) for start in STARTS for taught in TAUGHT}


def table(variant: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the run file of a variant, as a table."""
    start, taught = VARIANTS[variant]
    out = read_toml(HERE / "base.toml")
    out |= {"seed": seed, **STARTS[start]}
    out["source"] = str(options.checkpoint)
    out["out"] = str(options.runs / f"{start}-{taught}-{seed}")
    out["data"]["sources"][0]["path"] = str(options.text)
    out["data"]["cache"] = str(options.runs / "tokens")
    out["train"]["steps"] = options.steps
    if (teacher := TAUGHT[taught]) is not None:
        out["teacher"] = {"source": str(options.checkpoint), **teacher}
    return out


def go(variant: str, seed: int, dense: float, options: argparse.Namespace) -> common.Result:
    """Train one run in its own process; return its curve and the tokens until it was near the dense model."""
    run = table(variant, seed, options)
    common.train(run, 1)
    lines = common.lines_of(run["out"])
    curve = [(0, lines[0]["held_out_start"])]
    curve += [(line["tokens"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    reached = next((tokens for tokens, loss in curve if loss <= dense + NEAR), None)
    return {
        "variant": variant,
        "seed": seed,
        "dense": round(dense, 5),
        "reached": reached,
        "curve": [[tokens, round(loss, 5)] for tokens, loss in curve],
        "divergence": [round(line["divergence"], 5) for line in lines[19::20] if "divergence" in line],
        "seconds": round(sum(line["seconds"] for line in lines)),
    }


def dense_loss(options: argparse.Namespace) -> float:
    """Return the held-out loss of the dense model on the same rows: the score before a first step."""
    run = table(next(iter(VARIANTS)), 0, options)
    for section in ("moe", "init"):
        del run[section]
    run["out"], run["train"]["steps"] = str(options.runs / "dense"), 1
    common.train(run, 1)
    return float(common.lines_of(run["out"])[0]["held_out_start"])


def main() -> None:
    """Run the missing jobs, gather the results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    dense = dense_loss(options)
    jobs = [(variant, seed) for seed in range(options.seeds) for variant in VARIANTS]
    about = {"near": NEAR, "steps": options.steps}
    found = common.gather(
        HERE / "results.json", jobs, lambda v, s: go(v, s, dense, options), list(VARIANTS), 1, about
    )
    for result in found:
        curve = result["curve"]
        print(
            f"{result['variant']:16} seed {result['seed']}: {curve[0][1] - dense:+.3f} at the start, "
            f"{curve[-1][1] - dense:+.3f} at the end, within {NEAR} after {result['reached']} tokens"
        )


if __name__ == "__main__":
    main()
