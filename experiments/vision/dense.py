"""The dense ViTs for the experiments on images, trained for long.

Both are trained on CIFAR-10 at a constant rate, with augmentation that is strong for their size. The *small*
one (124 thousand parameters) is where the variants of `table.py` start. The *large* one is twice as wide, and
the predecessor in `jetpack.py`. FOLDER/images has `cifar10-train.parquet` and `cifar10-test.parquet`.

    python experiments/vision/dense.py FOLDER small --until 70
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from continuation import Start  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
WIDTHS = {"small": 48, "large": 96}  # heads have 16 channels
BATCH = 128  # images per step
RATE = 1e-3
EPOCH = 391  # steps for 50,000 images
# The small one has spent, after 154 epochs, 98 % of the FLOPs of the large one after 42.
EPOCHS = {"small": (21, 42, 70, 154), "large": (21, 42)}  # where each stops, and others may start


def table(size: str, folder: Path) -> dict[str, Any]:
    """Return the run file."""
    return {
        "source": str(folder / f"{size}-shape"),
        "out": str(folder / f"{size}-run"),
        "from_scratch": True,
        "seed": 0,
        "task": {
            "name": "image_classification",
            "test": str(folder / "images" / "cifar10-test.parquet"),
            "augment": {
                "flip": 0.5, "crop_padding": 4, "rand_augment_layers": 1, "rand_augment_magnitude": 15.0,
                "erasing": 0.25,
            },
        },
        "data": {
            "sources": [{"path": str(folder / "images" / "cifar10-train.parquet")}],
            "cache": str(folder / "pixels"),
        },
        "train": {
            "steps": max(EPOCHS[size]) * EPOCH, "batch_size": BATCH, "precision": "float32",
            "weight_decay": 0.05, "beta2": 0.999, "eval_every": 7 * EPOCH // 2, "eval_examples": 10_000,
        },
        "schedule": {"name": "constant", "peak": RATE, "warmup": 200},
        "checkpoint": {"every": 7 * EPOCH, "keep": 40},
    }  # fmt: skip


def model(size: str) -> PreTrainedModel:
    """Return a ViT with random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    width = WIDTHS[size]
    config = ViTConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=4, num_attention_heads=width // 16,
        image_size=32, patch_size=8, id2label=dict(enumerate(NAMES)),
        label2id={name: number for number, name in enumerate(NAMES)},
    )  # fmt: skip
    return ViTForImageClassification(config)


STARTS = {
    size: Start(
        table=partial(table, size),
        model=partial(model, size),
        steps={epochs: epochs * EPOCH for epochs in EPOCHS[size]},
        name=size,
        exported=("--dtype", "float32", "--optimizer"),
    )
    for size in WIDTHS
}


def main() -> None:
    """Train a model, or resume its training, export every start, and record the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the images are, and the runs and models go")
    parser.add_argument("size", choices=[*STARTS])
    parser.add_argument("--until", type=int, required=True, help="epochs")
    given = parser.parse_args()
    start = STARTS[given.size]
    if given.until not in start.steps:
        parser.error(f"the {given.size} model stops after {', '.join(map(str, start.steps))} epochs")
    start.train(given.folder, given.until)
    start.record(given.folder, HERE / f"{given.size}.json")


if __name__ == "__main__":
    main()
