"""Plain rows of text, for a model class whose head belongs to no known task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.data.feeding import Feed, Feeding
from upcycle.tasks import Batch, Question
from upcycle.tasks._positions import refuse_beyond_positions
from upcycle.tasks._tokens import TokenFeed
from upcycle.tasks.causal_lm import CausalLM, rows_alone

if TYPE_CHECKING:
    from upcycle.dense.subject import Subject


class Plain(CausalLM):
    """Packed rows of a text. It trains nothing, and a run file cannot name it."""

    @property
    def name(self) -> str:
        """The task's name in the provenance of statistics."""
        return "plain"

    def feed(self, feeding: Feeding, subject: Subject) -> Feed:
        refuse_beyond_positions(feeding.length, subject, setting=feeding.setting)
        return TokenFeed(feeding, subject, rows_alone)

    def question(self, batch: Batch, subject: Subject, *, training: bool) -> Question:
        return Question({"input_ids": batch["rows"][:, :-1]}, batch["rows"][:, 1:])
