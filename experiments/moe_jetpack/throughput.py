"""The throughput of the models that `run.py` trained, forward and in training, beside their FLOPs.

The models take turns, so that other load on the machine affects all alike. The script writes
`throughput.json`.

    python experiments/moe_jetpack/throughput.py --rounds 12
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from upcycle.hf import models

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402

BATCH = 128
# One model of each architecture: the weights do not matter.
MODELS = {
    "dense": "small_finetuned", "large": "large_finetuned", "soft, 16 experts": "soft_importance",
    "spherical, 16 experts": "copies", "spherical, 8 + 16 experts": "importance",
    "the same, repo": "importance_repo",
}  # fmt: skip


def main() -> None:
    """Time every model in turn, and write medians and ranges."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = {r["variant"]: r for r in json.loads((HERE / "results.json").read_text())["runs"]}
    made = {name: opened(options.runs, variant) for name, variant in MODELS.items()}
    pixels, labels = torch.randn(BATCH, 3, 32, 32), torch.arange(BATCH) % 10
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "training": []} for name in made}
    for turn in range(options.rounds + 1):
        for name, model in made.items():
            found = {
                "forward": timed(partial(forward, model, pixels)),
                "training": timed(partial(step, model, pixels, labels)),
            }
            if turn:  # the first round warms up
                for what, seconds in found.items():
                    times[name][what].append(BATCH / seconds)
    rows = {
        name: {
            "flops_per_image": known[f"cifar10/{MODELS[name]}"]["training_flops_per_image"] // 3,
            "parameters": known[f"cifar10/{MODELS[name]}"]["parameters"],
            **{
                what: {"median": round(statistics.median(of)), "low": round(min(of)), "high": round(max(of))}
                for what, of in times[name].items()
            },
        }
        for name in made
    }
    about = {"batch": BATCH, "threads": options.threads, "rounds": options.rounds, "torch": torch.__version__}
    (HERE / "throughput.json").write_text(json.dumps({**about, "images_per_second": rows}, indent=1) + "\n")
    for name, row in rows.items():
        speeds = f"{row['forward']['median']:7} {row['training']['median']:7}"
        print(f"{name:28} {row['flops_per_image'] / 1e6:7.1f} {speeds}")


def opened(runs: Path, variant: str) -> PreTrainedModel:
    """Load the model at the end of a run."""
    folder = runs / f"cifar10-{variant}-0-exported"
    if not folder.exists():
        common.upcycle("export", str(runs / f"cifar10-{variant}-0"), str(folder))
    return models.open(folder)


def forward(model: PreTrainedModel, pixels: torch.Tensor) -> None:
    """Run a batch forward without gradients."""
    with torch.inference_mode():
        model.eval()(pixel_values=pixels)


def step(model: PreTrainedModel, pixels: torch.Tensor, labels: torch.Tensor) -> None:
    """Run a batch forward and backward, without the update."""
    logits = model.train()(pixel_values=pixels).logits
    torch.nn.functional.cross_entropy(logits, labels).backward()
    model.zero_grad()


def timed(work: Callable[[], None]) -> float:
    """Return the seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
