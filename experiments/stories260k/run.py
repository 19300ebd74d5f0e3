"""Does upcycling pay at this size, and is the balance loss to blame for the weakness of plain copies?

The script trains every variant with every seed and gathers `results.json`; runs that are already there are
not repeated.

    python experiments/stories260k/run.py --checkpoint stories260k --text tinystories.txt
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from upcycle.recipe import read_toml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402

MOE = {"moe": {"num_experts": 8, "top_k": 2}}
DROP = {
    f"drop_{ratio}_{indices}": (ratio, indices)
    for ratio in (0.25, 0.5)
    for indices in ("shared", "independent")
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense_equal_flops": {},
    "copy": {**MOE, "init": {"name": "copy"}},
    "copy_pooled_balance": {**MOE, "init": {"name": "copy"}, "router": {"balance_loss": "pooled"}},
    **{
        name: {**MOE, "init": {"name": "drop", "ratio": ratio, "indices": indices}}
        for name, (ratio, indices) in DROP.items()
    },
    "scratch": {**MOE, "from_scratch": True},
}


def table(variant: str, seed: int, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the run file of a variant, as a table."""
    out = read_toml(HERE / "base.toml")
    out |= {"seed": seed, **VARIANTS[variant]}
    out["source"] = str(options.checkpoint)
    out["out"] = str(options.runs / f"{variant}-{seed}")
    out["data"]["sources"][0]["path"] = str(options.text)
    out["data"]["cache"] = str(options.runs / "tokens")
    out["train"]["steps"] = steps
    return out


def go(variant: str, seed: int, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one run in its own process; return its curve and the load of its layers."""
    run = table(variant, seed, steps, options)
    common.train(run, options.threads)
    folder = Path(run["out"])
    record = json.loads((folder / "run.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    per_token = record["training_flops_per_token"]
    curve = [[0, 0, lines[0]["held_out_start"]]]
    curve += [
        [x["tokens"], x["tokens"] * per_token, x["held_out_loss"]] for x in lines if "held_out_loss" in x
    ]
    for private in ("source", "out"):
        run[private] = Path(run[private]).name
    run["data"]["sources"][0]["path"] = Path(options.text).name
    run["data"].pop("cache")
    keys = ("load", "entropy", "busiest", "dead", "collapsed")
    return {
        "variant": variant,
        "seed": seed,
        "run": run,
        "parameters": record["parameters"],
        "active_parameters": record["active_parameters"],
        "training_flops_per_token": per_token,
        "curve": [[tokens, flops, round(loss, 5)] for tokens, flops, loss in curve],
        "layers": [{k: layer[k] for k in keys} for layer in lines[-1].get("layers", ())],
        "most_collapsed_layers": max(
            (sum(layer["collapsed"] for layer in x["layers"]) for x in lines if "layers" in x), default=0
        ),
        "mean_entropy_by_step": [
            round(sum(layer["entropy"] for layer in x["layers"]) / len(x["layers"]), 4)
            for x in lines[:: max(1, len(lines) // 20)]
            if "layers" in x
        ],
    }


def main() -> None:
    """Run the missing jobs, gather the results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    flops = {"dense": 2047488, "moe": 3053568}  # training FLOPs per token, checked against the runs below
    longer = round(options.steps * flops["moe"] / flops["dense"])
    steps = {variant: longer if variant == "dense_equal_flops" else options.steps for variant in VARIANTS}
    done = common.gather(
        HERE / "results.json",
        [(variant, seed) for seed in range(options.seeds) for variant in VARIANTS],
        lambda variant, seed: go(variant, seed, steps[variant], options),
        list(VARIANTS),
        options.jobs,
        {},
    )
    for r in done:
        assert r["training_flops_per_token"] == flops["moe" if "moe" in r["run"] else "dense"]
    print(f"{'variant':28} {'start':>8} {'end':>8} {'error':>8}")
    for variant in VARIANTS:
        mine = [r for r in done if r["variant"] == variant]
        end, error = common.mean_and_error([r["curve"][-1][2] for r in mine])
        start, _ = common.mean_and_error([r["curve"][0][2] for r in mine])
        print(f"{variant:28} {start:8.4f} {end:8.4f} {common.error_text(error, '{:8.4f}')}")


if __name__ == "__main__":
    main()
