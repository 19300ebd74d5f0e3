"""Sparse Upcycling of a small ViT on CIFAR-10: is it worth its FLOPs?

Trains the dense model, then every variant on every seed, scores their checkpoints and gathers `results.json`;
what is there already is not run again.

    python experiments/sparse_upcycling_vit/run.py --images FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from upcycle.recipe import read_toml

HERE = Path(__file__).parent
NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
BASE_STEPS = 2400
MOE = {
    "moe": {"num_experts": 8, "layers": "last_half", "target": "upcycled"},
    "router": {"name": "expert_choice", "capacity_factor": 2.0},
}
CARRIED = {"optimizer": {"carry_state": True}}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": CARRIED,
    "expert_choice_carried": {**MOE, **CARRIED},
    "expert_choice_fresh": MOE,
    "random_experts": {**MOE, "init": {"name": "drop", "ratio": 1.0}},
    "scratch": {**MOE, "from_scratch": True},
}
TRAIN = (
    "import json, sys; from upcycle.training.loop import train; from upcycle.training.run import Run; "
    "train(Run.of(json.load(sys.stdin)), resume=True)"
)


def process(code: str, threads: int, given: Any = None) -> None:
    """Run Python in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    text = json.dumps(given)
    subprocess.run([sys.executable, "-c", code], input=text, text=True, check=True, env=environment)


def paths(table: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The table with the images of this machine."""
    table["data"]["sources"][0]["path"] = str(options.images / "cifar10-train.parquet")
    table["data"]["cache"] = str(options.runs / "images")
    table["task"]["test"] = str(options.images / "cifar10-test.parquet")
    return table


def base(options: argparse.Namespace) -> Path:
    """The trained dense model, with its optimizer's moments."""
    out = options.runs / "dense-base"
    if out.exists():
        return Path(out)
    shape = options.runs / "vit"
    if not shape.exists():
        from transformers import ViTConfig, ViTForImageClassification

        labels = dict(enumerate(NAMES))
        config = ViTConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, image_size=32,
            patch_size=8, id2label=labels, label2id={name: i for i, name in labels.items()},
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained(shape)
    table = paths(read_toml(HERE / "base.toml"), options)
    table |= {"source": str(shape), "out": str(options.runs / "base")}
    process(TRAIN, options.threads, table)
    subprocess.run(
        [sys.executable, "-m", "upcycle", "export", table["out"], str(out), "--optimizer"], check=True
    )
    return Path(out)


def table(variant: str, seed: int, source: Path, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """The run file of a variant, as a table."""
    out = paths(read_toml(HERE / "continue.toml"), options)
    out |= {"seed": seed, **VARIANTS[variant]}
    out |= {"source": str(source), "out": str(options.runs / f"{variant}-{seed}")}
    out["train"] |= {"steps": steps, "eval_every": max(1, steps // 4)}
    out["checkpoint"]["every"] = max(1, steps // 4)
    if variant != "scratch":
        out["schedule"]["start_step"] = BASE_STEPS
    return out


def flops(variant: str, source: Path, options: argparse.Namespace) -> int:
    """Active FLOPs of training on an image."""
    from upcycle.training.run import Run
    from upcycle.training.start import start_of

    begun = start_of(Run.of(table(variant, 0, source, 1, options)))
    begun.dense.checkpoint.close()
    return begun.training_flops_per_row({"layers": begun.dense.family.length(begun.dense.config)})


def go(variant: str, seed: int, source: Path, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one run, score its checkpoints, and tell what came out."""
    run = table(variant, seed, source, steps, options)
    process(TRAIN, options.threads, run)
    folder = Path(run["out"])
    record = json.loads((folder / "run.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [(0, lines[0]["held_out_start"], lines[0]["held_out_accuracy_start"])]
    points += [(x["step"], x["held_out_loss"], x["held_out_accuracy"]) for x in lines if "held_out_loss" in x]
    per_step = record["training_flops_per_row"] * 128
    for private in ("source", "out"):
        run[private] = Path(run[private]).name
    run["data"]["sources"][0]["path"] = Path(run["data"]["sources"][0]["path"]).name
    run["task"]["test"] = Path(run["task"]["test"]).name
    run["data"].pop("cache")
    shot = few_shot(folder, options)
    return {
        "variant": variant,
        "seed": seed,
        "run": run,
        "parameters": record["parameters"],
        "active_parameters": record["active_parameters"],
        "training_flops_per_image": record["training_flops_per_row"],
        "seconds": round(sum(x["seconds"] for x in lines)),
        "curve": [
            {"step": step, "flops": step * per_step, "loss": round(loss, 5), "accuracy": accuracy}
            for step, loss, accuracy in points
        ],
        "few_shot": shot,
        "left_behind": [layer["left_behind"] for layer in lines[-1].get("layers", ())],
    }


def few_shot(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The 10-shot probe on Fashion-MNIST, which no model has seen, at the end of a run."""
    out = folder / "exported"
    if not out.exists():
        subprocess.run([sys.executable, "-m", "upcycle", "export", str(folder), str(out)], check=True)
    command = [
        sys.executable, "-m", "upcycle", "eval", str(out), "--json",
        "--few-shot", str(options.images / "fashion_mnist-train.parquet"),
        "--images", str(options.images / "fashion_mnist-test.parquet"),
        "--limit", "4000", "--cache", str(options.runs / "images"),
    ]  # fmt: skip
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(said)["checkpoints"][0]["few_shot"]
    return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    return mean, math.sqrt(spread / len(values))


def main() -> None:
    """Run what is missing, gather, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of cifar10-*.parquet and the like")
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--steps", type=int, default=320, help="of the MoE; the dense model gets its FLOPs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-base", action="store_true")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    source = base(options)
    if options.only_base:
        return
    cost = {variant: flops(variant, source, options) for variant in VARIANTS}
    steps = {v: round(options.steps * cost["expert_choice_fresh"] / cost[v]) for v in VARIANTS}
    results = HERE / "results.json"
    known = json.loads(results.read_text())["runs"] if results.exists() else []
    done = {(r["variant"], r["seed"]): r for r in known}
    wanted = [(v, seed) for seed in range(options.seeds) for v in VARIANTS if (v, seed) not in done]
    log = options.runs / "base" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    keys = ("step", "held_out_loss", "held_out_accuracy")
    trained = [{k: x[k] for k in keys} for x in lines if "held_out_loss" in x]
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [(v, seed, source, steps[v], options) for v, seed in wanted]
        for result in pool.map(lambda job: go(*job), jobs):
            done[(result["variant"], result["seed"])] = result
            order = sorted(done.values(), key=lambda r: (list(VARIANTS).index(r["variant"]), r["seed"]))
            results.write_text(json.dumps({"base": trained, "runs": order}, indent=1) + "\n")
    print(f"{'variant':24} {'accuracy':>9} {'error':>7} {'10-shot':>8} {'error':>7}")
    for variant in VARIANTS:
        mine = [r for r in done.values() if r["variant"] == variant]
        end, error = mean_and_error([r["curve"][-1]["accuracy"] for r in mine])
        shot, shot_error = mean_and_error([r["few_shot"]["accuracy"] for r in mine])
        print(f"{variant:24} {end:9.4f} {error:7.4f} {shot:8.4f} {shot_error:7.4f}")


if __name__ == "__main__":
    main()
