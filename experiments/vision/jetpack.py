"""MoE Jetpack against dense models that were trained as long in total, and gathers `jetpack.json`.

The larger ViT of `dense.py` is cut into the experts of a smaller one. Both dense models have been trained for
the same epochs, so the smaller one, continued, has the FLOPs per image of the MoE and as many images in total
(`dense`). `small_of_all_flops` has spent, when it starts, what the training of the larger one cost. `large`
continues for as many seconds as the MoE trains, and not as many FLOPs.

    python experiments/vision/jetpack.py FOLDER --variants core --seeds 3
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import common  # noqa: E402
import dense  # noqa: E402
from continuation import CARRIED, Changes, Continuation  # noqa: E402

# Seconds per FLOP of the larger model's training, relative to those of the MoE: measured, see README.md.
LARGE_SECONDS = 0.54

STATISTICS = "{folder}/large-{start}.safetensors"
WARM: Changes = {"schedule": {"warmup": 200}}  # a narrower model has lost its function
NARROWER: Changes = {"source": "{folder}/large-{start}", "successor": {"hidden_size": dense.WIDTHS["small"]}}
# An image has 16 patches: half as many core experts and as many universal ones, as in the paper; or 16 alike.
LAYERS: dict[str, Any] = {"target": "upcycled", "layers": "last_half"}
DUAL: Changes = {
    "moe": {**LAYERS, "num_experts": 8, "universal_experts": 16}, "router": {"name": "spherical"},
}  # fmt: skip
ALIKE: Changes = {"moe": {**LAYERS, "num_experts": 16}, "router": {"name": "spherical"}}
IMPORTANCE: dict[str, Any] = {"name": "importance", "statistics": STATISTICS}

CORE: dict[str, Changes] = {
    "dense": CARRIED,
    "importance": {**NARROWER, **DUAL, "init": IMPORTANCE, **WARM},
    "importance_repo": {
        **DUAL, "source": "{folder}/large-{start}", "init": {**IMPORTANCE, "preset": "repo"},
        "router": {"name": "spherical", "preset": "repo"},
        "successor": {"hidden_size": dense.WIDTHS["small"], "rest": "{folder}/small-{start}"},
    },
    "large": {"source": "{folder}/large-{start}", **CARRIED},
    "small_of_all_flops": {"source": "{folder}/small-154", **CARRIED},
}  # fmt: skip

FACTORS: dict[str, Changes] = {
    "copies": ALIKE,
    "weight_selection": {"source": "{folder}/selected-{start}", **WARM},
    "uniform": {**NARROWER, **DUAL, "init": {"name": "uniform"}, **WARM},
}


SMALL_ALONE = ("dense", "copies", "small_of_all_flops")  # these take nothing from the larger model


@dataclass(frozen=True, kw_only=True)
class Recycling(Continuation):
    """Variants that need statistics of the larger model, or a dense selection from it."""

    def falling(self, variant: str) -> float:
        """Return the same share of the steps for every run, as they have other FLOPs per second."""
        return self.decay

    def gather(self, folder: Path, jobs: Sequence[tuple[int, str, int]], parallel: int) -> None:
        for start in {start for start, variant, _ in jobs if variant not in SMALL_ALONE}:
            prepare(folder, start)
        super().gather(folder, jobs, parallel)


def prepare(folder: Path, start: int) -> None:
    """Collect statistics of the larger model, and make a dense selection from it, if they are not there."""
    large, statistics = str(folder / f"large-{start}"), folder / f"large-{start}.safetensors"
    if not statistics.exists():
        common.upcycle(
            "calibrate", large, "--images", str(folder / "images" / "cifar10-train.parquet"),
            "--collect", "l2", "--limit", "10000", "--cache", str(folder / "pixels"),
            "--out", str(statistics),
        )  # fmt: skip
    if not (selected := folder / f"selected-{start}").exists():
        common.upcycle(
            "convert", large, str(selected), "--target", "dense", "--init", "uniform",
            "--set", f"successor.hidden_size={dense.WIDTHS['small']}",
        )  # fmt: skip


BOTH = {
    epochs: steps for epochs, steps in dense.STARTS["small"].steps.items() if epochs in dense.EPOCHS["large"]
}

EXPERIMENT = Recycling(
    start=replace(dense.STARTS["small"], steps=BOTH),
    variants=CORE | FACTORS,
    core=[*CORE],
    results=HERE / "jetpack.json",
    default=42,
    extra=0.4,
    scores=("loss", "accuracy"),
    shorter={"large": LARGE_SECONDS},
)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
