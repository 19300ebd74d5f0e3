"""Fine-tuning on chats: predict what the assistant says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from upcycle.data import chats
from upcycle.data.chat_rows import ChatRows
from upcycle.data.corpus import Data
from upcycle.data.corruption import IGNORED
from upcycle.data.documents import Source, saved_splits
from upcycle.data.feeding import Feed, Feeding
from upcycle.data.splits import mixed, to_score
from upcycle.errors import UpcycleError, shown
from upcycle.families import CAUSAL_HEADS
from upcycle.system import progress
from upcycle.tasks import ON_HOST, POSITIONS, Batch, Found, Judge, Question, Task
from upcycle.tasks._chat_tokens import end_of_answer, read_template, tokens_of, with_template
from upcycle.tasks._labelled import objection_to, only_source, refuse_unknown_ids, split
from upcycle.tasks._tokens import objection_to_sources, tokenizer_of

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.dense.subject import Subject


@dataclass(frozen=True, kw_only=True)
class SFT(Task):
    """Chats from one source of JSON lines or parquet, as the chat template of the tokenizer writes them.

    Only the assistant's tokens have a loss. Whole chats are packed into rows of `train.sequence_length`
    tokens and padded. The model is scored on the set `test`; without it, on the share `data.held_out` of the
    rows. Of a Hugging Face dataset with splits, `test_split` is read.
    """

    summary = "what the assistant says in a chat"
    heads = CAUSAL_HEADS
    reads = "chats"
    splits = True
    counting = {"logits_to_keep": 1}
    by_token = True
    isolates = True

    test: str | None = None  # the set to score on; none: data.held_out of the rows
    # split of `test` if that is a Hugging Face dataset with splits; none: test, or the only one
    test_split: str | None = None
    chat_template: str | None = None  # a file with a chat template (Jinja); none: that of the tokenizer
    # the day, YYYY-MM-DD, that a template writes as today's (strftime_now): the same whenever it is written
    today: str = "2024-07-26"
    # what becomes of a chat that is longer than a row: left out, or cut at its end
    too_long: Literal["leave_out", "cut"] = "leave_out"
    pack: bool = True  # whether several chats share a row; each sees those before it, but for data.isolate

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_split is not None and self.test is None:
            raise UpcycleError(
                f"task.test_split = {self.test_split} is a split of task.test, which is not set; set it, too"
            )
        try:
            date.fromisoformat(self.today)
        except ValueError:
            raise UpcycleError(
                f"task.today = {shown(self.today)}; it must be a day, such as 2024-07-26"
            ) from None

    def feed(self, feeding: Feeding, subject: Subject) -> Feed:
        train = self._rows(only_source(feeding, self), feeding, subject)
        test = None if self._scored is None else self._rows(self._scored, feeding, subject)
        return split(train, test, feeding)

    @property
    def _scored(self) -> Source | None:
        """The set to score on, if it is one of its own."""
        return None if self.test is None else to_score(self.test, self.test_split)

    @property
    def _today(self) -> date:
        return date.fromisoformat(self.today)

    def objection(self, data: Data) -> str | None:
        test = self._scored
        return (
            objection_to(data, self, test, ("field", "separator", "append_eos"))
            or objection_to_sources(data)
            or (None if test is None else mixed(test))
        )

    def continued(self, recorded: Mapping[str, Any]) -> SFT:
        """Go on with the split that versions without `test_split` scored on, which was train."""
        if self.test is None or "test_split" in recorded or self.test_split is not None:
            return self
        has_splits = self.test.startswith("hf:") or saved_splits(Path(self.test)) is not None
        return replace(self, test_split="train") if has_splits else self

    def _rows(self, source: Source, feeding: Feeding, subject: Subject) -> ChatRows:
        tokenizer = with_template(tokenizer_of(feeding, subject), self.chat_template)
        found = ChatRows.of(
            tokens_of(chats.read(source.path, source.split), tokenizer, self._today),
            name=source.path,
            length=feeding.length,
            cut=self.too_long == "cut",
            pack=self.pack,
            isolate=feeding.data.isolate,
            setting=feeding.setting,
            padding=tokenizer.pad_token_id or 0,
        )
        refuse_unknown_ids(found.ids, source.path, subject)
        for note in found.notes():
            progress.say(note)
        return found

    def files(self) -> Mapping[str, str]:
        path = self.chat_template
        return {} if path is None else {"chat_template.jinja": read_template(path)}

    def end(self, tokenizer: Any) -> int | None:
        return end_of_answer(tokenizer, self._today)

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

    def lengths(self, length: int, subject: Subject) -> dict[str, int]:
        return subject.all_of(length)


task = SFT
