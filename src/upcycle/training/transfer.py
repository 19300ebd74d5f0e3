"""What is on its way between the host and a device: rows, and numbers. Meanwhile the host queues work."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from upcycle.tasks import ON_HOST, POSITIONS, Batch


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> Batch:
    """Return a batch of the host on a device. From pinned memory the copy waits for nothing that is queued.

    Positions are on the host as well, where they tell what documents a row has.
    """
    kept = {ON_HOST: batch[POSITIONS]} if POSITIONS in batch else {}
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()} | kept
    moved = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
    return moved | kept


class Transfer:
    """One asynchronous copy of several tensors of numbers; `read` waits for it.

    They travel as float64, which holds every count up to 2^53 exactly.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])
        self._host = flat.to("cpu", non_blocking=True)  # torch takes pinned memory for it
        self._event: torch.Event | None = None
        if flat.device.type != "cpu":
            self._event = torch.Event(flat.device)
            self._event.record()

    def read(self) -> dict[str, Tensor]:
        """Return the tensors by name, flat and on the CPU, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._sizes, self._host.split([*self._sizes.values()]), strict=True))
