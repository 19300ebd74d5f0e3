"""BERT's pretraining: predict masked tokens of a text (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np

from upcycle.data.corpus import Data
from upcycle.data.corruption import IGNORED, mask_tokens
from upcycle.data.feeding import Feed, Feeding
from upcycle.errors import UpcycleError
from upcycle.settings import Within
from upcycle.tasks import Batch, Question, Task
from upcycle.tasks._positions import refuse_beyond_positions
from upcycle.tasks._tokens import (
    TokenFeed,
    objection_to_sources,
    tokenizer_of,
)
from upcycle.tensors import rng

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.dense.subject import Subject


@dataclass(frozen=True, kw_only=True)
class MaskedLM(Task):
    """The model predicts a share `probability` of the tokens of a packed row.

    Of these, 80 % are masked, 10 % are replaced by random tokens, and 10 % are left unchanged.
    """

    summary = "the masked tokens of a text (BERT)"
    heads = ("ForMaskedLM",)

    probability: Annotated[float, Within("(0, 1)")] = 0.15  # share of the tokens that the model predicts

    def objection(self, data: Data) -> str | None:
        return objection_to_sources(data)

    def feed(self, feeding: Feeding, subject: Subject) -> Feed:
        refuse_beyond_positions(feeding.length, subject, setting=feeding.setting)
        tokenizer = tokenizer_of(feeding, subject)
        if tokenizer.mask_token_id is None:
            raise UpcycleError(
                "masked language modelling wants a tokenizer with a mask; in a run, set data.tokenizer"
            )
        special = frozenset(tokenizer.all_special_ids)

        def make(rows: np.ndarray, keys: Sequence[rng.Key]) -> dict[str, np.ndarray]:
            made = mask_tokens(
                rows[:, :-1],
                keys,
                probability=self.probability,
                mask_id=tokenizer.mask_token_id,
                vocab_size=subject.vocab_size,
                special_ids=special,
            )
            return {"inputs": made.inputs, "labels": made.labels}

        return TokenFeed(feeding, subject, make)

    def question(self, batch: Batch, subject: Subject, *, training: bool) -> Question:
        return Question({"input_ids": batch["inputs"]}, batch["labels"])

    def targets(self, batch: Batch) -> Tensor:
        return (batch["labels"] != IGNORED).sum()

    def lengths(self, length: int, subject: Subject) -> dict[str, int]:
        return {"layers": length}


task = MaskedLM
