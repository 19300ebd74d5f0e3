"""Run a study on a small language model: train what is missing, gather `results.json`, draw the figure.

One dense model is trained from scratch on three texts, and the variants of `studies.py` continue from it.
After the warm-up the learning rate is constant, in the dense model and in the runs, so that each point of a
run is the end of a shorter run. A run that is in `results.json` is not repeated.

    python experiments/language.py drop_upcycling --checkpoint stories260k --texts FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import common  # noqa: E402
import figure  # noqa: E402
import studies  # noqa: E402

TEXTS = ("tinystories.txt", "tinyshakespeare.txt", "wikitext2-valid.txt")
BASE_STEPS = 800


def options() -> argparse.Namespace:
    """Return the command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("study", choices=[*studies.STUDIES])
    parser.add_argument(
        "--checkpoint", type=Path, help="stories260k: its config and its tokenizer; to train what is missing"
    )
    parser.add_argument("--texts", type=Path, help=f"folder of {', '.join(TEXTS)}")
    parser.add_argument(
        "--base", type=Path, default=HERE / "runs", help="where the dense model is, or will be"
    )
    parser.add_argument("--runs", type=Path, help="where the runs go (default: runs/ beside the results)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    given.results = HERE / given.study / "results.json"
    given.runs = given.runs or given.results.parent / "runs"
    return given


def table(changes: Mapping[str, Any], seed: int, steps: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return a run file that starts from the trained dense model.

    If `changes` has from_scratch, it starts from random weights of the same shape.
    """
    scratch = changes.get("from_scratch", False)
    out: dict[str, Any] = {
        "source": str(given.checkpoint if scratch else base(given)),
        "data": {
            "sources": [{"path": str(given.texts / name)} for name in TEXTS],
            "held_out": 0.05, "append_eos": False, "cache": str(given.base / "tokens"),
        },
        "train": {
            "steps": steps, "batch_tokens": 2048, "sequence_length": 128, "precision": "float32",
            "eval_every": max(1, steps // 8), "eval_tokens": 16384,
        },
        "schedule": {"name": "constant", "peak": 2e-3, "warmup": 40},
        "checkpoint": {"every": 0, "keep": 1},
        "seed": seed,
    }  # fmt: skip
    return out | dict(changes)


def base(given: argparse.Namespace) -> Path:
    """Return the dense model, which is trained if it does not exist."""
    out: Path = given.base / "dense"
    if not out.exists():
        given.base.mkdir(parents=True, exist_ok=True)
        run = table({"from_scratch": True}, 0, BASE_STEPS, given) | {"out": str(given.base / "dense-run")}
        common.train(run, given.threads)
        common.upcycle("export", run["out"], str(out))
    return out


def base_curve(given: argparse.Namespace) -> list[list[float]]:
    """Return the steps, FLOPs and held-out losses of the dense model's training."""
    return curve(given.base / "dense-run")


def curve(folder: Path) -> list[list[float]]:
    """Return the steps, FLOPs and held-out losses of a run; the first is before training."""
    record, lines = json.loads((folder / "run.json").read_text()), common.lines_of(folder)
    flops = record["training_flops_per_row"] * (
        record["run"]["train"]["batch_tokens"] // record["tokens_per_row"]
    )
    points = [(0, lines[0]["held_out_start"])]
    points += [(x["step"], x["held_out_loss"]) for x in lines if "held_out_loss" in x]
    return [[step, step * flops, round(loss, 5)] for step, loss in points]


def go(
    variant: str, changes: Mapping[str, Any], seed: int, steps: int, given: argparse.Namespace
) -> dict[str, Any]:
    """Train one run, and return its result."""
    folder = given.runs / f"{variant}-{seed}"
    common.train(table(changes, seed, steps, given) | {"out": str(folder)}, given.threads)
    record, last = json.loads((folder / "run.json").read_text()), common.lines_of(folder)[-1]
    layers = last.get("layers", ())
    return {
        "variant": variant,
        "seed": seed,
        "changes": dict(changes),
        "steps": steps,
        "parameters": record["parameters"],
        "active_parameters": record["active_parameters"],
        "curve": curve(folder),
        "seconds": round(sum(x["seconds"] for x in common.lines_of(folder))),
        "left_behind": [layer["left_behind"] for layer in layers],
        "load_entropy": [layer["entropy"] for layer in layers],
        "collapsed": sum(layer["collapsed"] for layer in layers),
    }


def flops_per_step(changes: Mapping[str, Any], given: argparse.Namespace) -> int:
    """Return the active FLOPs of a step of 2,048 tokens."""
    run = table(changes, 0, 8, given) | {"out": str(given.runs / "nothing")}
    return common.flops_per_row(run) * 16


def losses(runs: Sequence[Mapping[str, Any]], variant: str, point: int = -1) -> tuple[float, float | None]:
    """Return the mean and standard error of the held-out loss at a point of a variant's curves."""
    return common.mean_and_error([r["curve"][point][2] for r in runs if r["variant"] == variant])


def steps_of(study: studies.Study, given: argparse.Namespace) -> dict[str, int]:
    """Return the steps of every variant of a study."""

    def steps(variant: str) -> int:
        def cost(name: str) -> int:
            return flops_per_step(study.variants[name], given)

        match study.budget(variant):
            case studies.Steps(steps=number):
                return number
            case studies.Share(share=share):
                return round(share * base_curve(given)[-1][1] / cost(variant))
            case studies.AsMuchAs(variant=other):
                return round(steps(other) * cost(other) / cost(variant))

    return {variant: steps(variant) for variant in study.variants}


def reaches(curve: list[list[float]], loss: float) -> float | None:
    """Return the FLOPs at which a curve first falls to a loss, by linear interpolation; None: never."""
    for (_, before, high), (_, after, low) in pairwise(curve):
        if low <= loss:
            return before + (after - before) * max(0.0, high - loss) / max(1e-12, high - low)
    return None


def rows(study: studies.Study, runs: Sequence[Mapping[str, Any]], budget: float) -> list[str]:
    """Return the table of a study: every point of every variant, with the error of the mean."""
    rivals = [run["curve"] for run in runs if run["variant"] == study.rival]
    lines = [f"{'variant':28} {'step':>6} {'FLOPs / dense':>13} {'loss':>8} {'error':>8}"]
    for variant in study.variants:
        own = [run for run in runs if run["variant"] == variant]
        for point, (step, flops, _) in enumerate(own[0]["curve"]):
            loss, error = losses(runs, variant, point)
            line = f"{variant:28} {step:6} {flops / budget:13.1%} {loss:8.4f} "
            line += f"{common.error_text(error, '{:.4f}'):>8}"
            if rivals and variant != study.rival:
                found = [reaches(curve, loss) for curve in rivals]
                told = ["never" if flops is None else f"{flops / budget:.0%}" for flops in found]
                line += f"   {study.rival} reaches it at: {', '.join(told)}"
            lines.append(line)
        if left := [share for run in own for share in run["left_behind"]]:
            lines[-1] += f"   left behind: {sum(left) / len(left):.1%}"
    return lines


def draw(study: studies.Study, runs: Sequence[Mapping[str, Any]], budget: float, path: Path) -> None:
    """Draw the figure of a study."""

    def x(step: float, flops: float) -> float:
        return {studies.STEPS: step, studies.FLOPS: flops, studies.RELATIVE: flops / budget}[study.x]

    curves = {
        label: [
            [(x(step, flops), loss) for step, flops, loss in run["curve"][variant in study.late :]]
            for run in runs
            if run["variant"] == variant
        ]
        for label, variant in study.shown.items()
    }
    counted = "power" if study.x == studies.FLOPS else None
    figure.write(path, study.title, curves, study.x, "held-out loss (nats per token)", counted=counted)


def train(study: studies.Study, jobs: Sequence[tuple[str, int]], given: argparse.Namespace) -> None:
    """Run the jobs (variant, seed) that are missing, and add them to the study's results."""
    base(given)
    steps = steps_of(study, given)
    common.gather(
        given.results,
        jobs,
        lambda name, seed: go(name, study.variants[name], seed, steps[name], given),
        list(study.variants),
        given.jobs,
        {"dense_training": base_curve(given)},
    )


def main() -> None:
    """Run the missing jobs of a study, print the table and draw the figure."""
    given = options()
    study = studies.STUDIES[given.study]
    jobs = [(name, seed) for seed in range(given.seeds) for name in study.variants]
    done = common.results_file(given.results, list(study.variants)).known()
    if missing := [job for job in jobs if job not in done]:
        if given.checkpoint is None or given.texts is None:
            sys.exit(f"{len(missing)} runs are missing: give --checkpoint and --texts to train them")
        train(study, jobs, given)
    found = json.loads(given.results.read_text())
    _, budget, loss = found["dense_training"][-1]
    print(f"dense model: held-out loss {loss:.4f} after {budget:.3g} FLOPs")
    print("\n".join(rows(study, found["runs"], budget)))
    draw(study, found["runs"], budget, given.results.parent / "figure.png")


if __name__ == "__main__":
    main()
