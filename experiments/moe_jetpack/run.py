"""MoE Jetpack at a small scale: what recycling a larger ViT into many small experts is worth.

Trains two predecessors, measures the larger one's activations, then trains every variant of the same smaller
successor on each data set and seed, and gathers `results.json`; what is there already is not run again.

    python experiments/moe_jetpack/run.py --images FOLDER
"""

from __future__ import annotations

import argparse
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
    """Run what is missing, gather, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of cifar10-*.parquet and the like")
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--only", default="")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    for name in [options.only] if options.only else SIZES:
        predecessor(name, options)


if __name__ == "__main__":
    main()
