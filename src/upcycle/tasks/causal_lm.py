"""Language modelling: predict the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from upcycle.data.corpus import Data
from upcycle.data.corruption import IGNORED
from upcycle.data.feeding import Feed, Feeding
from upcycle.families import CAUSAL_HEADS
from upcycle.tasks import ON_HOST, POSITIONS, Batch, Question, Task
from upcycle.tasks._tokens import TokenFeed, objection_to_sources
from upcycle.tensors import rng

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.dense.subject import Subject


@dataclass(frozen=True, kw_only=True)
class CausalLM(Task):
    """Predicts each token of a packed row from those before it.

    With `data.isolate`, from those of its own document, and not the first of a document.
    """

    summary = "the next token of a text"
    heads = CAUSAL_HEADS
    counting = {"logits_to_keep": 1}
    by_token = True
    isolates = True
    in_windows = True

    def objection(self, data: Data) -> str | None:
        return objection_to_sources(data)

    def feed(self, feeding: Feeding, subject: Subject) -> Feed:
        return TokenFeed(feeding, subject, rows_alone)

    def question(self, batch: Batch, subject: Subject, *, training: bool) -> Question:
        rows, positions = batch["rows"], batch.get(POSITIONS)
        inputs, labels = {"input_ids": rows[:, :-1], "use_cache": False}, rows[:, 1:]
        if positions is None:
            return Question(inputs, labels)
        # The first token of a document is nothing that the document before it could tell.
        labels = labels.masked_fill(positions[:, 1:] == 0, IGNORED)
        known = batch.get(ON_HOST, positions)[:, :-1]
        return Question({**inputs, "position_ids": positions[:, :-1]}, labels, known)

    def targets(self, batch: Batch) -> int | Tensor:
        if POSITIONS in batch:
            return batch[POSITIONS][:, 1:].count_nonzero()
        rows, length = batch["rows"].shape
        return rows * (length - 1)

    def lengths(self, length: int, subject: Subject) -> dict[str, int]:
        return subject.all_of(length)

    def shapes(self, rows: int, length: int) -> dict[str, tuple[int, ...]]:
        return {"rows": (rows, length + 1)}


def rows_alone(rows: np.ndarray, keys: Sequence[rng.Key]) -> dict[str, np.ndarray]:
    """Return rows of tokens [N, L + 1] unchanged; nothing is drawn for them."""
    return {"rows": rows}


task = CausalLM
