"""Questions about torch's autocast that have an answer on every kind of device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def dtype(kind: str) -> torch.dtype | None:
    """Return the type in which autocast computes on a kind of device; None if it is off."""
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def off(kind: str) -> AbstractContextManager[Any]:
    """Return a context in which there is no autocast."""
    return nullcontext() if dtype(kind) is None else torch.autocast(kind, enabled=False)
