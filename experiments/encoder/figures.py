"""Draw the figures of this experiment from `results.json` and `narrow.json`, and print its tables.

python experiments/encoder/figures.py
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import narrow  # noqa: E402
import run  # noqa: E402

import dense  # noqa: E402
from outcome import Outcome, draw_start  # noqa: E402


def main() -> None:
    """Draw every figure and print the tables."""
    draw_start(HERE / "dense.json", "tokens per parameter", dense.UNIT / 10)
    Outcome.of(run.EXPERIMENT).report("tokens per parameter", "nats per token")
    Outcome.of(narrow.EXPERIMENT).report("tokens per parameter", "nats per token", name="narrow")


if __name__ == "__main__":
    main()
