"""The parts that experiments on a small language model share.

One dense model is trained from scratch on three texts, and runs continue from it in different ways. After the
warm-up the learning rate is constant, in the dense model and in the runs, so that each point of a run is the
end of a shorter run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import common  # noqa: E402

TEXTS = ("tinystories.txt", "tinyshakespeare.txt", "wikitext2-valid.txt")
BASE_STEPS = 800
MOE = {"moe": {"num_experts": 8, "top_k": 2}}
PATHS = ("source", "out")


def options(description: str | None, here: Path) -> argparse.Namespace:
    """Return the command-line options that every such experiment has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="stories260k: its config and its tokenizer"
    )
    parser.add_argument("--texts", type=Path, required=True, help=f"folder of {', '.join(TEXTS)}")
    parser.add_argument(
        "--base", type=Path, default=HERE / "runs", help="where the dense model is, or will be"
    )
    parser.add_argument("--runs", type=Path, default=here / "runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


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


def losses(runs: Sequence[Mapping[str, Any]], variant: str, point: int = -1) -> tuple[float, float]:
    """Return the mean and standard error of the held-out loss at a point of a variant's curves."""
    return common.mean_and_error([r["curve"][point][2] for r in runs if r["variant"] == variant])
