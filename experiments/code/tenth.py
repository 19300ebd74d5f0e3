"""The same with a budget of a tenth of the start's training FLOPs, and gathers `tenth.json`.

The runs of `run.py` go on for 30 %, and their learning rate is constant until 23 %. So what they say of less
compute is said of models whose rate has not fallen. Here it falls in the last quarter of a tenth.

    python experiments/code/tenth.py FOLDER --starts 40 80 --variants core --seeds 3
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import run  # noqa: E402
import table  # noqa: E402

CORE = ["dense", "virtual_group", "shuffle_slice", "copy_every_other", "copy"]
EXPERIMENT = replace(
    run.EXPERIMENT,
    variants={name: table.VARIANTS[name] for name in CORE},
    core=CORE,
    questions={},
    results=HERE / "tenth.json",
    runs="tenth",
    extra=0.1,
    points=8,
)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
