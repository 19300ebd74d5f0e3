"""What changes if the balance loss has the shares of the micro batches so far, and not of the batch?

The script times a step of both kinds (`router.balance_counts`) in turns, in processor time. Then it trains a
small MoE with four micro batches a step in both ways and gathers `results.json`. Runs that are there are not
repeated.

    python experiments/balance_counts/run.py --checkpoint stories260k --text tinystories.txt
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from upcycle.recipe import read_toml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402

VARIANTS = ("exact", "buffered")
LAST = 20  # steps over which the load is averaged
PAIRS = 12  # steps of each kind that are timed


def table(counts: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the run file of a variant, as a table."""
    out = read_toml(HERE / "base.toml")
    out |= {"seed": seed, "source": str(options.checkpoint), "out": str(options.runs / f"{counts}-{seed}")}
    out["router"] = {**out["router"], "balance_counts": counts}
    out["data"]["sources"][0]["path"] = str(options.text)
    out["data"]["cache"] = str(options.runs / "tokens")
    out["train"]["steps"] = options.steps
    return out


def go(counts: str, seed: int, options: argparse.Namespace) -> common.Result:
    """Train one run; return its scores and how the load lay on the experts."""
    from upcycle.training.loop import train

    run = table(counts, seed, options)
    if not train(run, resume=True).finished:
        sys.exit(f"{run['out']} was stopped; start the script again, and it goes on")
    lines = common.lines_of(run["out"])
    busiest = [layer["busiest"] * len(layer["load"]) for line in lines[-LAST:] for layer in line["layers"]]
    return {
        "variant": counts,
        "seed": seed,
        "held_out": [[x["step"], round(x["held_out_loss"], 5)] for x in lines if "held_out_loss" in x],
        "balance_loss": round(statistics.mean(line["balance_loss"] for line in lines[-LAST:]), 5),
        "busiest_over_mean": round(statistics.mean(busiest), 4),
        "dead": sum(layer["dead"] for line in lines[-LAST:] for layer in line["layers"]),
        "loss": round(statistics.mean(line["loss"] for line in lines[-LAST:]), 5),
    }


def seconds_of_steps(options: argparse.Namespace) -> dict[str, float]:
    """Return the processor time of a step of both kinds, the median of steps taken in turns."""
    from upcycle import tasks
    from upcycle.training import optimizer, start, step
    from upcycle.training.parallel import ranks
    from upcycle.training.routing import Routers
    from upcycle.training.run import Run
    from upcycle.training.trainee import Trainee

    trainees = {}
    for counts in VARIANTS:
        run = Run.of(table(counts, 0, options))
        with ranks(run.parallel) as here:
            begun = start.start_of(run)
            model = start.model_of(begun, run, here, "float32")
        trainees[counts] = Trainee(
            model=model, task=tasks.of(begun.dense.architecture), start=begun, routers=Routers.of(model),
            optimizer=optimizer.make(model, run.optimizer), run=run, ranks=here, precision="float32",
        )  # fmt: skip
    train = trainees["exact"].run.train
    rows = torch.randint(0, 512, (train.rows, train.sequence_length + 1))
    taken: dict[str, list[float]] = {counts: [] for counts in VARIANTS}
    for number in range(PAIRS + 2):
        for counts in VARIANTS:
            began = time.process_time()
            step.train_step(trainees[counts], {"rows": rows}, number, 1e-4)
            if number > 1:
                taken[counts].append(time.process_time() - began)
    return {counts: round(statistics.median(each), 4) for counts, each in taken.items()}


def main() -> None:
    """Run the missing jobs, gather the results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = HERE / "results.json"
    about = json.loads(results.read_text()) if results.exists() else {}
    about["steps"] = options.steps
    jobs = [(counts, seed) for seed in range(options.seeds) for counts in VARIANTS]
    about.pop("runs", None)
    about.setdefault("processor_seconds_of_a_step", seconds_of_steps(options))
    found = common.gather(results, jobs, lambda c, s: go(c, s, options), VARIANTS, 1, about)
    for counts in VARIANTS:
        runs = [each for each in found if each["variant"] == counts]
        loss, error = common.mean_and_error([each["held_out"][-1][1] for each in runs])
        load, of_load = common.mean_and_error([each["busiest_over_mean"] for each in runs])
        seconds = about["processor_seconds_of_a_step"][counts]
        print(
            f"{counts:8} held-out {loss:.4f}{common.error_text(error, ' +- {:.4f}')}, "
            f"busiest expert {load:.3f}{common.error_text(of_load, ' +- {:.3f}')} even shares, "
            f"{seconds} s of processor time a step"
        )
    apart = [
        b["held_out"][-1][1] - a["held_out"][-1][1]
        for a, b in zip(*([r for r in found if r["variant"] == c] for c in VARIANTS), strict=True)
    ]
    mean, error = common.mean_and_error(apart)
    print(f"buffered - exact: {mean:+.4f}{common.error_text(error, ' +- {:.4f}')}")


if __name__ == "__main__":
    main()
