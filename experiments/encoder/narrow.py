"""Narrow experts in the encoder, from a second training of the dense T5, and gathers `narrow.json`.

They are the best of the experiments on code at equal FLOPs. The models of the first training were not kept.
The second one leaves its plateau some hundred steps later, so that its model after as many tokens is another
one: dense continuation is run again, too.

    python experiments/encoder/narrow.py FOLDER --variants core --seeds 3
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import run  # noqa: E402
import table  # noqa: E402

CORE = ["dense", "shuffle_slice", "virtual_group"]
EXPERIMENT = replace(
    run.EXPERIMENT,
    variants={name: table.VARIANTS[name] for name in CORE},
    core=CORE,
    results=HERE / "narrow.json",
    runs="narrow",
)


if __name__ == "__main__":
    EXPERIMENT.main(__doc__)
