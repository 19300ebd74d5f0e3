"""Folders as `upcycle train` and `upcycle export` leave them, with numbers of the test's choosing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROWS, LENGTH = 4, 16  # of a batch, tokens of a row
DENSE, MOE = 1000, 1500  # training FLOPs of a token

Curve = Callable[[float], float]  # tokens to nats


def write_run(
    folder: Path,
    curve: Curve,
    *,
    moe: Mapping[str, Any] | None = None,
    steps: int = 40,
    done: int | None = None,
    seed: int = 0,
    source: str = "/nowhere/dense",
    from_scratch: bool = False,
    task: str = "causal_lm",
    every: int = 10,
    **changes: Any,
) -> Path:
    """A run whose held-out loss is `curve` of the tokens. `changes` go over sections of its run file."""
    has_experts = moe is not None
    flops = MOE if has_experts else DENSE
    table: dict[str, Any] = {
        "source": source,
        "out": str(folder),
        "from_scratch": from_scratch,
        "seed": seed,
        "data": {"sources": [{"path": "corpus.jsonl", "weight": 1.0}], "held_out": 0.1},
        "train": {
            "steps": steps, "batch_tokens": ROWS * LENGTH, "sequence_length": LENGTH, "eval_every": every,
            "eval_tokens": 256,
        },
        "schedule": {"name": "cosine", "peak": 1e-3},
        "router": {"balance_loss_coef": 0.01},
        "log": {"every": 10},
    }  # fmt: skip
    if moe is not None:
        table |= {"moe": {"num_experts": 4, "top_k": 2, **moe}, "init": {"name": "copy"}}
        table["router"] |= {"name": "top_k"}
    for section, value in changes.items():
        table[section] = {**table.get(section, {}), **value} if isinstance(value, dict) else value
    about = {
        "format": 1,
        "upcycle_version": "0.1.0",
        "versions": {"torch": "2.13.0", "numpy": "2.0", "python": "3.11"},
        "precision": "float32",
        "task": task,
        "tokens_per_row": LENGTH,
        "training_flops_per_row": flops * LENGTH,
        "training_flops_per_token": flops,
        "source": {"name": Path(source).name, "path": source, "model_type": "llama"},
        "blueprint_hash": "0123456789abcdef" if has_experts else None,
        "architecture": "MixtralForCausalLM" if has_experts else "LlamaForCausalLM",
        "parameters": 4_000_000 if has_experts else 1_000_000,
        "active_parameters": 2_000_000 if has_experts else 1_000_000,
        "from_scratch": from_scratch,
        "run": table,
        "identity": {},
    }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(about))
    lines = []
    for step in range(1, (steps if done is None else done) + 1):
        tokens = step * ROWS * LENGTH
        record: dict[str, Any] = {
            "step": step, "tokens": tokens, "loss": curve(tokens) + 0.1, "lr": 1e-3, "grad_norm": 1.0,
            "seconds": 0.5, "tokens_per_s": 128.0, "active_flops_per_s": 128.0 * flops, "mfu": None,
            "peak_memory": 123_000_000,
        }  # fmt: skip
        if step == 1:
            record |= {"held_out_start": curve(0), "held_out_accuracy_start": 0.1}
        if step % every == 0 or step == steps:
            record |= {"held_out_loss": curve(tokens), "held_out_accuracy": 0.1 + step / 1000}
        if has_experts:
            record["layers"] = [
                {
                    "layer": layer, "load": [0.4, 0.3, 0.3, 0.0], "entropy": 0.78, "busiest": 0.4,
                    "idlest": 0.0, "dead": 1, "collapsed": False, "left_behind": 0.02,
                    "router_grad_norm": 0.1,
                }
                for layer in (1, 3)
            ]  # fmt: skip
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def write_checkpoint(folder: Path, run: Path | None = None, *, step: int = 40, **files: Any) -> Path:
    """A folder that says it was exported from `run`, without weights; `files` are JSON files beside it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if run is not None:
        about = json.loads((run / "run.json").read_text())
        training = {k: about[k] for k in ("task", "training_flops_per_token", "from_scratch", "run")}
        made = {
            "format": 1,
            "source": {"name": "dense", "path": about["source"]["path"], "sha256": {}, "donors": {}},
            "recipe": None,
            "blueprint_hash": None,
            "training": [{**training, "step": step, "tokens": step * ROWS * LENGTH}],
        }
        (folder / "upcycle.json").write_text(json.dumps(made))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def scores(**values: tuple[float, float | None]) -> dict[str, Any]:
    """eval.json with the accuracy of tasks."""
    return {
        "format": 1,
        "results": [
            {
                "kind": "tasks",
                "name": name,
                "metrics": {"accuracy": {"value": value, "standard_error": error, "higher_is_better": True}},
            }
            for name, (value, error) in values.items()
        ],
    }


ROUTING = {
    "format": 1,
    "layers": [
        {
            "stack": "layers", "layer": layer, "load": [0.1, 0.2, 0.3, 0.4], "confidence": 0.6,
            "left_behind": 0.0, "divergence": [[0.0, 0.25], [0.25, 0.0]], "divergence_of": "loads",
            "load_by_domain": {"stories": [0.2, 0.2, 0.2, 0.4], "plays": [0.0, 0.2, 0.4, 0.4]},
            "favourites": [[[f"word-{layer}-{expert}", 0.75]] for expert in range(4)],
        }
        for layer in (1, 3)
    ],
    "domains": [{"name": "stories"}, {"name": "plays"}],
    "kind": "text",
}  # fmt: skip
"""routing.json of two layers."""
