"""What a fork of `forked.Server` does before its command line."""

from __future__ import annotations

import sys
import time
from typing import Any


def import_the_hub_anew() -> None:
    """Let the hub's client, which reads the environment when it is imported, read that of this process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


def calibrate_slowly() -> None:
    """Say when a batch of a calibration begins, and take long over it."""
    from upcycle.calibration import sweep

    real = sweep._batch

    def slow(*arguments: Any, **options: Any) -> None:
        print("batch", flush=True)
        time.sleep(0.2)
        real(*arguments, **options)

    sweep._batch = slow
