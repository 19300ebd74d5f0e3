"""All tensors of a folder, or of a blueprint, as numpy arrays."""

from __future__ import annotations

import numpy as np

from upcycle.checkpoints.checkpoint import Checkpoint


def stored(folder) -> dict[str, np.ndarray]:
    opened = Checkpoint.open(folder)
    return {
        name: opened.pread(info, 0, info.nbytes).view(np.float32).reshape(info.shape).copy()
        for name, info in opened.tensors.items()
    }


def made(built) -> dict[str, np.ndarray]:
    return {name: entry.lazy.all("F32") for name, entry in built.entries.items()}
