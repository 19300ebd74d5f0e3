"""MoE Jetpack at small scale: does it pay to recycle a larger ViT into small experts?

The script trains a larger and a smaller predecessor on CIFAR-10 and collects statistics of the larger one.
Then it trains every variant with every seed on CIFAR-10 and Fashion-MNIST, and gathers `results.json`; runs
that are already there are not repeated. If none is missing, it draws the figures and needs no images.

    python experiments/moe_jetpack/run.py --images FOLDER
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
import figure  # noqa: E402

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
SETS = ("cifar10", "fashion_mnist")
SIZES = {"large": (128, 4), "small": (64, 2)}  # hidden size, heads
KEYS = ("step", "held_out_loss", "held_out_accuracy")

# An image has 16 patches: half as many core experts and as many universal ones, as in the paper; or 16 alike.
LAYERS: dict[str, Any] = {"target": "upcycled", "layers": "last_half"}
DUAL = {"moe": {**LAYERS, "num_experts": 8, "universal_experts": 16}}
ALIKE = {"moe": {**LAYERS, "num_experts": 16}}
SPHERICAL = {"router": {"name": "spherical"}}
SOFT = {"router": {"name": "soft"}}
SMALL = {"source": "small-trained"}
RECYCLED = {"source": "large-trained", "successor": {"hidden_size": 64}}
SCRATCH = {"source": "small", "from_scratch": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense_scratch": SCRATCH,
    "dense_selected": {"source": "selected"},
    "small_finetuned": SMALL,
    "large_finetuned": {"source": "large-trained"},
    "soft_scratch": {**SCRATCH, **ALIKE, **SOFT},
    "soft_importance": {**RECYCLED, **ALIKE, **SOFT, "init": {"name": "importance"}},
    "spherical_scratch": {**SCRATCH, **DUAL, **SPHERICAL, "init": {"name": "random"}},  # for its widths only
    "copies": {**SMALL, **ALIKE, **SPHERICAL},
    "random": {**RECYCLED, **DUAL, **SPHERICAL, "init": {"name": "random"}},
    "uniform": {**RECYCLED, **DUAL, **SPHERICAL, "init": {"name": "uniform"}},
    "co_activation": {**RECYCLED, **DUAL, **SPHERICAL, "init": {"name": "co_activation"}},
    "importance": {**RECYCLED, **DUAL, **SPHERICAL, "init": {"name": "importance"}},
    "importance_repo": {
        **RECYCLED, **DUAL, "init": {"name": "importance", "preset": "repo"},
        "router": {"name": "spherical", "preset": "repo"},
        "successor": {"hidden_size": 64, "rest": "small-trained"},
    },
}  # fmt: skip
ORDER = [f"{data}/{variant}" for data in SETS for variant in VARIANTS]
SHOWN = (
    "dense_scratch",
    "small_finetuned",
    "large_finetuned",
    "spherical_scratch",
    "copies",
    "importance",
)


def with_images(table: dict[str, Any], data: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the table with a data set on this machine."""
    table["data"] = {
        "sources": [{"path": str(options.images / f"{data}-train.parquet")}],
        "cache": str(options.runs / "images"),
    }
    table["task"]["test"] = str(options.images / f"{data}-test.parquet")
    return table


def predecessor(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train a dense ViT if it does not exist, and return its curve."""
    shape = options.runs / name
    if not shape.exists():
        from transformers import ViTConfig, ViTForImageClassification

        hidden, heads = SIZES[name]
        labels = dict(enumerate(NAMES))
        config = ViTConfig(
            hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=6, num_attention_heads=heads,
            image_size=32, patch_size=8, id2label=labels, label2id={name: i for i, name in labels.items()},
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained(shape)
    run = options.runs / f"{name}-run"
    if not (options.runs / f"{name}-trained").exists():
        table = with_images(read_toml(HERE / "predecessor.toml"), "cifar10", options)
        common.train(table | {"source": str(shape), "out": str(run)}, options.threads)
        common.upcycle("export", str(run), str(options.runs / f"{name}-trained"))
    return [{k: x[k] for k in KEYS} for x in common.lines_of(run) if "held_out_loss" in x]


def prepare(options: argparse.Namespace) -> None:
    """Prepare the statistics of the larger predecessor and a dense selection from it."""
    large = str(options.runs / "large-trained")
    if not (options.runs / "statistics.safetensors").exists():
        common.upcycle(
            "calibrate", large, "--images", str(options.images / "cifar10-train.parquet"),
            "--collect", "l2,co_activation", "--limit", "10000", "--cache", str(options.runs / "images"),
            "--out", str(options.runs / "statistics.safetensors"),
        )  # fmt: skip
    if not (options.runs / "selected").exists():
        common.upcycle(
            "convert", large, str(options.runs / "selected"), "--target", "dense", "--init", "uniform",
            "--set", "successor.hidden_size=64",
        )  # fmt: skip


def table(data: str, variant: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the run file of a variant, as a table."""
    settings = VARIANTS[variant]
    out = with_images(read_toml(HERE / "successor.toml"), data, options)
    out |= {"seed": seed, **settings}
    out |= {"source": str(options.runs / settings["source"])}
    out |= {"out": str(options.runs / f"{data}-{variant}-{seed}")}
    if settings.get("init", {}).get("name") in ("importance", "co_activation"):
        out["init"] = {**settings["init"], "statistics": str(options.runs / "statistics.safetensors")}
    if rest := settings.get("successor", {}).get("rest"):
        out["successor"] = {**settings["successor"], "rest": str(options.runs / rest)}
    if data != "cifar10":
        out["task"]["classes"] = 10  # a new head
    return out


def go(job: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one run, and return its result."""
    data, variant = job.split("/")
    run = table(data, variant, seed, options)
    common.train(run, options.threads)
    out = Path(run["out"])
    record = json.loads((out / "run.json").read_text())
    lines = common.lines_of(out)
    flops = record["training_flops_per_row"]
    return {
        "variant": job,
        "seed": seed,
        "parameters": record["parameters"],
        "training_flops_per_image": flops,
        "seconds": round(sum(x["seconds"] for x in lines)),
        "curve": common.curve(out, run["train"]["batch_size"], flops),
    }


def show(runs: list[dict[str, Any]]) -> None:
    """Print the table of each data set."""
    for data in SETS:
        print(
            f"\n{data:20} {'parameters':>10} {'MFLOPs':>7} {'start':>7} {'half':>7} {'end':>7} {'error':>7}"
        )
        for variant in VARIANTS:
            mine = [r for r in runs if r["variant"] == f"{data}/{variant}"]
            if not mine:
                continue
            half = len(mine[0]["curve"]) // 2
            at = [common.mean_and_error([r["curve"][i]["accuracy"] for r in mine]) for i in (0, half, -1)]
            cost = mine[0]["training_flops_per_image"] / 1e6
            print(
                f"{variant:20} {mine[0]['parameters']:10,} {cost:7.1f} "
                f"{at[0][0]:7.4f} {at[1][0]:7.4f} {at[2][0]:7.4f} "
                f"{common.error_text(at[2][1], '{:7.4f}')}"
            )


def draw(runs: list[dict[str, Any]]) -> None:
    """Draw the accuracy on each data set."""
    for data in SETS:
        curves = {
            v: [
                [(p["step"], p["accuracy"]) for p in r["curve"]]
                for r in runs
                if r["variant"] == f"{data}/{v}"
            ]
            for v in SHOWN
        }
        figure.write(HERE / f"{data}.png", f"Accuracy on {data}", curves, "steps of 128 images", "accuracy")


def train(jobs: list[tuple[str, int]], options: argparse.Namespace) -> None:
    """Train the predecessors and the jobs that are missing, and add them to the results."""
    options.runs.mkdir(parents=True, exist_ok=True)
    predecessors = {name: predecessor(name, options) for name in SIZES}
    prepare(options)
    common.gather(
        HERE / "results.json",
        jobs,
        lambda job, seed: go(job, seed, options),
        ORDER,
        options.jobs,
        {"predecessors": predecessors},
    )


def main() -> None:
    """Run the missing jobs, print the tables and draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--images", type=Path, help="folder of cifar10-*.parquet and the like; to train what is missing"
    )
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    jobs = [(job, seed) for seed in range(options.seeds) for job in ORDER]
    results = common.results_file(HERE / "results.json", ORDER)
    if missing := {*jobs} - {*results.known()}:
        if options.images is None:
            sys.exit(f"{len(missing)} runs are missing: give --images to train them")
        train(jobs, options)
    runs = [*results.known().values()]
    show(runs)
    draw(runs)


if __name__ == "__main__":
    main()
