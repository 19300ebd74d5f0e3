"""Spares a decoder the question whether its rows pack several texts, which waits for the device.

If there is no attention mask, transformers looks for jumps in the positions of every row, and asks the device
whether there are any. Our rows have plain positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import masking_utils

_NAME = "find_packed_sequence_indices"


@contextmanager
def unpacked() -> Iterator[None]:
    """Tell transformers inside the block that every row is one text, which is what it would find out."""
    original = getattr(masking_utils, _NAME, None)
    if original is None:
        yield
        return
    setattr(masking_utils, _NAME, _one_text)
    try:
        yield
    finally:
        setattr(masking_utils, _NAME, original)


def _one_text(position_ids: torch.Tensor) -> None:
    return None
