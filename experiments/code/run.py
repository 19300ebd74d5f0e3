"""Run the variants of `table.py` from the starts of `dense.py`, and gather `results.json`.

A run that is in `results.json` is not repeated, and an interrupted one resumes where it stopped.

    python experiments/code/run.py FOLDER --starts 80 320 --variants core --seeds 3
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import table  # noqa: E402

import dense  # noqa: E402
from continuation import Continuation  # noqa: E402

EXPERIMENT = Continuation(
    start=dense.START,
    variants=table.VARIANTS,
    core=[*table.CORE],
    questions=table.QUESTIONS,
    results=HERE / "results.json",
    default=320,
    shorter=table.SHORTER,
)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
