"""A model whose logits hold NaN has no score: the likeliest of NaN is the first token or class of all."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError


class NoNumbersError(UpcycleError):
    """The logits of a model hold NaN."""


def refuse_nan(numbers: torch.Tensor, subject: Subject) -> None:
    """Raise `NoNumbersError` if NaN is among `numbers`, which are logits or losses of any shape.

    Infinite ones pass: a class may give a token no probability at all.
    """
    if bool(numbers.isnan().any()):
        raise NoNumbersError(
            f"{subject.folder} gives NaN where a score needs numbers, so it has no score; look for NaN in "
            f"its weights, or take a checkpoint from before its training diverged"
        )


class RefuseNaN(LogitsProcessor):
    """Raises `NoNumbersError` at a token that would be chosen from logits with NaN."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        refuse_nan(scores, self._subject)
        return scores
