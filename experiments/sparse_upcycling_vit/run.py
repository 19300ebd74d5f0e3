"""Sparse Upcycling of a small ViT on CIFAR-10: is it worth its FLOPs?

The script trains the dense model, then every variant with every seed, and gathers `results.json`; runs that
are already there are not repeated.

    python experiments/sparse_upcycling_vit/run.py --images FOLDER
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
from continuation import CARRIED, expert_choice  # noqa: E402

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
MOE = expert_choice(2.0, "last_half")
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": CARRIED,
    "expert_choice_carried": {**MOE, **CARRIED},
    "expert_choice_fresh": MOE,
    "random_experts": {**MOE, "init": {"name": "drop", "ratio": 1.0}},
    "scratch": {**MOE, "from_scratch": True},
}


def with_images(table: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return the table with the images on this machine."""
    table["data"]["sources"][0]["path"] = str(options.images / "cifar10-train.parquet")
    table["data"]["cache"] = str(options.runs / "images")
    table["task"]["test"] = str(options.images / "cifar10-test.parquet")
    return table


def base(options: argparse.Namespace) -> Path:
    """Return the trained dense model, with the moments of its optimizer."""
    out = Path(options.runs / "dense-base")
    if out.exists():
        return out
    shape = options.runs / "vit"
    if not shape.exists():
        from transformers import ViTConfig, ViTForImageClassification

        labels = dict(enumerate(NAMES))
        config = ViTConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, image_size=32,
            patch_size=8, id2label=labels, label2id={name: i for i, name in labels.items()},
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained(shape)
    table = with_images(read_toml(HERE / "base.toml"), options)
    table |= {"source": str(shape), "out": str(options.runs / "base")}
    common.train(table, options.threads)
    common.upcycle("export", table["out"], str(out), "--optimizer")
    return out


def table(variant: str, seed: int, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the run file of a variant, as a table."""
    out = with_images(read_toml(HERE / "continue.toml"), options)
    out |= {"seed": seed, **VARIANTS[variant]}
    out |= {"source": str(base(options)), "out": str(options.runs / f"{variant}-{seed}")}
    out["train"] |= {"steps": steps, "eval_every": max(1, steps // 2)}
    out["checkpoint"] = {"every": 0}
    out["schedule"]["decay"] = steps // 4
    if variant == "scratch":
        # The others continue after a warm-up of 200 steps; this one has a short warm-up of its own.
        out["schedule"] |= {"name": "warmup_stable_decay", "warmup": steps // 10}
    else:
        out["schedule"]["start_step"] = read_toml(HERE / "base.toml")["train"]["steps"]
    return out


def go(variant: str, seed: int, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one run, evaluate it with the probe, and return its result."""
    run = table(variant, seed, steps, options)
    common.train(run, options.threads)
    out = Path(run["out"])
    record = json.loads((out / "run.json").read_text())
    lines = common.lines_of(out)
    shot = few_shot(out, options)
    for private in ("source", "out"):
        run[private] = Path(run[private]).name
    run["data"] = {"sources": [{"path": "cifar10-train.parquet"}]}
    run["task"]["test"] = "cifar10-test.parquet"
    flops = record["training_flops_per_row"]
    return {
        "variant": variant,
        "seed": seed,
        "run": run,
        "parameters": record["parameters"],
        "active_parameters": record["active_parameters"],
        "training_flops_per_image": flops,
        "seconds": round(sum(x["seconds"] for x in lines)),
        "curve": common.curve(out, run["train"]["batch_size"], flops),
        "few_shot": shot,
        "left_behind": [layer["left_behind"] for layer in lines[-1].get("layers", ())],
    }


def few_shot(out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the result of the 10-shot probe on Fashion-MNIST, which no model has seen."""
    exported = out / "exported"
    if not exported.exists():
        common.upcycle("export", str(out), str(exported))
    said = common.upcycle(
        "eval", str(exported), "--json", "--limit", "4000", "--cache", str(options.runs / "images"),
        "--few-shot", str(options.images / "fashion_mnist-train.parquet"),
        "--images", str(options.images / "fashion_mnist-test.parquet"),
    )  # fmt: skip
    found: dict[str, Any] = json.loads(said)["checkpoints"][0]["few_shot"]
    return found


def main() -> None:
    """Run the missing jobs, gather the results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of cifar10-*.parquet and the like")
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--steps", type=int, default=240, help="of the MoE; the dense model gets its FLOPs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    base(options)
    cost = {v: common.flops_per_row(table(v, 0, 4, options)) for v in VARIANTS}
    steps = {v: round(options.steps * cost["expert_choice_fresh"] / cost[v]) for v in VARIANTS}
    trained = [
        {k: x[k] for k in ("step", "held_out_loss", "held_out_accuracy")}
        for x in common.lines_of(options.runs / "base")
        if "held_out_loss" in x
    ]
    runs = common.gather(
        HERE / "results.json",
        [(v, seed) for seed in range(options.seeds) for v in VARIANTS],
        lambda variant, seed: go(variant, seed, steps[variant], options),
        list(VARIANTS),
        options.jobs,
        {"base": trained},
    )
    print(f"{'variant':24} {'accuracy':>9} {'error':>7} {'10-shot':>8} {'error':>7}")
    for variant in VARIANTS:
        mine = [r for r in runs if r["variant"] == variant]
        end, error = common.mean_and_error([r["curve"][-1]["accuracy"] for r in mine])
        shot, shot_error = common.mean_and_error([r["few_shot"]["accuracy"] for r in mine])
        errors = [f"{common.error_text(e, '{:.4f}'):>7}" for e in (error, shot_error)]
        print(f"{variant:24} {end:9.4f} {errors[0]} {shot:8.4f} {errors[1]}")


if __name__ == "__main__":
    main()
