"""Draw the figures of these experiments from `results.json` and `jetpack.json`, and print their tables.

python experiments/vision/figures.py
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jetpack  # noqa: E402
import run  # noqa: E402

import dense  # noqa: E402
from outcome import Outcome, draw_start  # noqa: E402


def main() -> None:
    """Draw every figure and print the tables."""
    for size in dense.STARTS:
        draw_start(HERE / f"{size}.json", "epochs", dense.EPOCH)
    Outcome.of(run.EXPERIMENT).report("epochs", "nats per image")
    Outcome.of(jetpack.EXPERIMENT).report("epochs", "nats per image", name="jetpack", highest=1.6)


if __name__ == "__main__":
    main()
