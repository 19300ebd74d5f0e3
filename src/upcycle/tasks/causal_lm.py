"""Language modelling: the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from upcycle.tasks import Batch, Feed, Question, Task
from upcycle.tasks._tokens import TokenFeed, beyond_positions
from upcycle.tensors import rng

if TYPE_CHECKING:
    from upcycle.dense.subject import Subject
    from upcycle.training.run import Run


@dataclass(frozen=True, kw_only=True)
class CausalLM(Task):
    """Each token of a packed row from those before it."""

    summary = "the next token of a text"
    heads = ("ForCausalLM",)
    counting = {"logits_to_keep": 1}

    def feed(self, run: Run, subject: Subject, out: Path) -> Feed:
        return TokenFeed(run, subject, out, run.train.sequence_length, _rows)

    def question(self, batch: Batch, subject: Subject, *, training: bool) -> Question:
        rows = batch["rows"]
        return Question({"input_ids": rows[:, :-1], "use_cache": False}, rows[:, 1:])

    def targets(self, batch: Batch) -> int:
        rows, length = batch["rows"].shape
        return rows * (length - 1)

    def beyond_positions(self, run: Run, subject: Subject) -> str | None:
        return beyond_positions(run, subject)

    def lengths(self, run: Run, subject: Subject) -> dict[str, int]:
        return {"layers": run.train.sequence_length}


def _rows(rows: np.ndarray, keys: Sequence[rng.Key]) -> dict[str, np.ndarray]:
    return {"rows": rows}


task = CausalLM
