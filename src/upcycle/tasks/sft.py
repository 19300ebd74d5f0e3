"""Fine-tuning on chats: predict what the assistant says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from upcycle.data import chats
from upcycle.data.chat_rows import ChatRows
from upcycle.data.corruption import IGNORED
from upcycle.data.feeding import Feed, Feeding
from upcycle.families import CAUSAL_HEADS
from upcycle.system import progress
from upcycle.tasks import ON_HOST, POSITIONS, Batch, Found, Judge, Question, Task
from upcycle.tasks._chat_tokens import read_template, tokens_of, with_template
from upcycle.tasks._labelled import only_source, refuse_unknown_ids, split
from upcycle.tasks._tokens import beyond_positions, tokenizer_of

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.dense.subject import Subject


@dataclass(frozen=True, kw_only=True)
class SFT(Task):
    """Chats from one source of JSON lines or parquet, as the chat template of the tokenizer writes them.

    Only the assistant's tokens have a loss. Whole chats are packed into rows of `train.sequence_length`
    tokens and padded. The model is scored on the set `test`; without it, on the share `data.held_out` of the
    rows.
    """

    summary = "what the assistant says in a chat"
    heads = CAUSAL_HEADS
    reads = "chats"
    splits = True
    counting = {"logits_to_keep": 1}
    by_token = True
    isolates = True

    test: str | None = None  # the set to score on; none: data.held_out of the rows
    chat_template: str | None = None  # a file with a chat template (Jinja); none: that of the tokenizer
    # what becomes of a chat that is longer than a row: left out, or cut at its end
    too_long: Literal["leave_out", "cut"] = "leave_out"
    pack: bool = True  # whether several chats share a row; each sees those before it, but for data.isolate

    def feed(self, feeding: Feeding, subject: Subject) -> Feed:
        source = only_source(feeding, self)
        train = self._rows(source, feeding, subject, feeding.data.sources[0].split)
        test = None if self.test is None else self._rows(self.test, feeding, subject)
        return split(train, test, feeding)

    def _rows(self, path: str, feeding: Feeding, subject: Subject, part: str = "train") -> ChatRows:
        tokenizer = with_template(tokenizer_of(feeding, subject), self.chat_template)
        found = ChatRows.of(
            tokens_of(chats.read(path, part), tokenizer),
            name=path,
            length=feeding.length,
            cut=self.too_long == "cut",
            pack=self.pack,
            isolate=feeding.data.isolate,
            padding=tokenizer.pad_token_id or 0,
        )
        refuse_unknown_ids(found.ids, path, subject)
        for note in found.notes():
            progress.say(note)
        return found

    def files(self) -> Mapping[str, str]:
        path = self.chat_template
        return {} if path is None else {"chat_template.jinja": read_template(path)}

    def question(self, batch: Batch, subject: Subject, *, training: bool) -> Question:
        inputs = {"input_ids": batch["ids"], "attention_mask": batch["mask"], "use_cache": False}
        if POSITIONS in batch:
            inputs["position_ids"] = batch[POSITIONS]
        return Question(inputs, batch["labels"], batch.get(ON_HOST, batch.get(POSITIONS)))

    def score(self, judge: Judge[Found], path: Path) -> Found:
        """Score each chat in a row of its own, so that none sees another."""
        return judge.rows(replace(self, pack=False), path)

    def targets(self, batch: Batch) -> Tensor:
        return (batch["labels"] != IGNORED).sum()

    def beyond_positions(self, length: int, subject: Subject) -> str | None:
        return beyond_positions(length, subject)

    def lengths(self, length: int, subject: Subject) -> dict[str, int]:
        return subject.all_of(length)


task = SFT
