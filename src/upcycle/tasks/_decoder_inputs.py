"""What the decoder of an encoder-decoder reads: ids shifted by one, behind a token that begins them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.dense.subject import Subject


def behind_start(ids: Tensor, subject: Subject) -> Tensor:
    """Return the start token and all but the last of `ids` [B, L], as T5's and BART's classes do."""
    first = subject.settings.get("decoder_start_token_id")
    return _shifted(ids, subject.settings.get("pad_token_id", 0) if first is None else first)


def mask_behind_start(mask: Tensor) -> Tensor:
    """Return the mask of what the decoder reads for the `mask` [B, L] of the ids."""
    return _shifted(mask, 1)


def _shifted(rows: Tensor, first: int) -> Tensor:
    import torch

    return torch.cat([torch.full_like(rows[:, :1], first), rows[:, :-1]], dim=1)
