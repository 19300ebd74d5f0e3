"""Run the variants of `table.py` from the starts of `dense.py`, and gather `results.json`.

A run that is in `results.json` is not repeated, and an interrupted one resumes where it stopped.

    python experiments/code/run.py FOLDER --starts 80 320 --variants core --seeds 3
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import table  # noqa: E402

import common  # noqa: E402
import dense  # noqa: E402

RESULTS = HERE / "results.json"


def run_file(folder: Path, start: int, variant: str, seed: int, steps: int) -> dict[str, Any]:
    """Return the run file of a variant from the dense model after `start` tokens per parameter."""
    changes = table.VARIANTS[variant]
    falling = table.DECAY * table.EXTRA / table.budget(variant)
    made = dense.table(folder) | {
        "source": str(folder / f"dense-{start}"),
        "out": str(folder / "runs" / f"{start}-{variant}-{seed}"),
        "from_scratch": False,
        "seed": seed,
        "schedule": {
            "name": "warmup_stable_decay", "peak": dense.RATE, "decay": max(1, round(falling * steps)),
        } | changes.get("schedule", {}),
        "checkpoint": {"every": max(1, steps // 4), "keep": 1},
    }  # fmt: skip
    made["train"] = made["train"] | {"steps": steps, "eval_every": max(1, steps // table.POINTS)}
    return made | {key: value for key, value in changes.items() if key != "schedule"}


def steps_of(folder: Path, start: int, variant: str) -> int:
    """Return the number of steps that cost the variant's budget, a multiple of the start's FLOPs."""
    spent = dense.STARTS[start] * common.flops_per_row(run_file(folder, start, "dense", 0, 8))
    return math.ceil(
        table.budget(variant) * spent / common.flops_per_row(run_file(folder, start, variant, 0, 8))
    )


def go(folder: Path, start: int, variant: str, seed: int) -> dict[str, Any]:
    """Train one run and return its result; its curve is [step, tokens, FLOPs, seconds, held-out loss]."""
    run = run_file(folder, start, variant, seed, steps_of(folder, start, variant))
    common.train(run, threads=1)
    out = Path(run["out"])
    record, lines = json.loads((out / "run.json").read_text()), common.lines_of(out)
    rows = dense.BATCH // record["tokens_per_row"]
    curve: list[list[float]] = [[0, 0, 0, 0.0, round(lines[0]["held_out_start"], 5)]]
    seconds = 0.0
    for line in lines:
        seconds += line["seconds"]
        if "held_out_loss" in line:
            step = line["step"]
            flops = step * rows * record["training_flops_per_row"]
            curve.append(
                [step, step * dense.BATCH, flops, round(seconds, 1), round(line["held_out_loss"], 5)]
            )
    return {
        "start": start,
        "variant": variant,
        "seed": seed,
        "changes": table.VARIANTS[variant],
        "parameters": record["parameters"],
        "active_parameters": record["active_parameters"],
        "curve": curve,
    }


def main() -> None:
    """Run the missing jobs, one thread each, and add every result when it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that dense.py filled")
    parser.add_argument("--starts", type=int, nargs="+", choices=[*dense.STARTS], default=[320])
    parser.add_argument("--variants", nargs="+", default=["core"], choices=["core", *table.VARIANTS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    given = parser.parse_args()
    names = [n for v in given.variants for n in (table.CORE if v == "core" else [v])]
    jobs = [(s, v, seed) for s in given.starts for seed in range(given.seeds) for v in names]
    known = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    done = {(r["start"], r["variant"], r["seed"]): r for r in known}
    about = {
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "upcycle")},
    }
    with ThreadPoolExecutor(given.jobs) as pool:
        for result in pool.map(lambda job: go(given.folder, *job), [j for j in jobs if j not in done]):
            done[result["start"], result["variant"], result["seed"]] = result
            runs = [done[key] for key in sorted(done)]
            RESULTS.write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")
    for (start, variant, seed), result in sorted(done.items()):
        print(f"{start:4} {variant:28} {seed}  {result['curve'][0][-1]:.4f} -> {result['curve'][-1][-1]:.4f}")


if __name__ == "__main__":
    main()
