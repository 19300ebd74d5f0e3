"""A model whose logits hold NaN has no score: the likeliest of NaN is the first token or class or expert."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError


class NoNumbersError(UpcycleError):
    """The logits of a model, or of its routers, hold NaN."""


def refuse_nan(numbers: torch.Tensor, subject: Subject, what: str = "a score") -> None:
    """Raise `NoNumbersError` if NaN is among `numbers`, which are of any shape and `what` is made of.

    Infinite ones pass: a class may give a token no probability at all.
    """
    if bool(numbers.isnan().any()):
        raise NoNumbersError(
            f"{subject.folder} gives NaN where {what} needs numbers, so it has none; look for NaN in its "
            f"weights, or take a checkpoint from before its training diverged"
        )


class RefuseNaN(LogitsProcessor):
    """Raises `NoNumbersError` at a token that would be chosen from logits with NaN."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        refuse_nan(scores, self._subject)
        return scores
