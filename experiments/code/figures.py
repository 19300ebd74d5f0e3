"""Draw the figures of this experiment from `results.json` and `tenth.json`, and print its tables.

python experiments/code/figures.py
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import run  # noqa: E402
import tenth  # noqa: E402

from outcome import Outcome  # noqa: E402


def read() -> Outcome:
    """Return what is in `results.json`."""
    return Outcome.of(run.EXPERIMENT)


def main() -> None:
    """Draw every figure and print the tables."""
    read().report("tokens per parameter", "nats per token", highest=3.5)
    Outcome.of(tenth.EXPERIMENT).report("tokens per parameter", "nats per token", name="tenth")


if __name__ == "__main__":
    main()
