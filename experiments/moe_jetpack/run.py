"""The two predecessors of a MoE Jetpack experiment, a larger and a smaller ViT, trained on CIFAR-10.

Writes `predecessors.json`. The successors are not trained yet.

    python experiments/moe_jetpack/run.py --images FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from upcycle.recipe import read_toml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
SIZES = {"large": (128, 4), "small": (64, 2)}  # hidden size, heads


def predecessor(name: str, options: argparse.Namespace) -> Path:
    """A trained dense ViT."""
    out = Path(options.runs / f"{name}-trained")
    if out.exists():
        return out
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
    table = read_toml(HERE / "predecessor.toml")
    table["data"] = {
        "sources": [{"path": str(options.images / "cifar10-train.parquet")}],
        "cache": str(options.runs / "images"),
    }
    table["task"]["test"] = str(options.images / "cifar10-test.parquet")
    table |= {"source": str(shape), "out": str(options.runs / f"{name}-run")}
    common.train(table, options.threads)
    common.upcycle("export", table["out"], str(out))
    return out


def main() -> None:
    """Train what is missing, and write their curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of cifar10-*.parquet")
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    curves = {}
    for name in SIZES:
        predecessor(name, options)
        keys = ("step", "held_out_loss", "held_out_accuracy")
        lines = common.lines_of(options.runs / f"{name}-run")
        curves[name] = [{k: round(x[k], 5) for k in keys} for x in lines if "held_out_loss" in x]
    (HERE / "predecessors.json").write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    main()
