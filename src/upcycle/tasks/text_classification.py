"""Text classification: which class a text, or a pair of texts, is of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.data.examples import Examples
from upcycle.data.texts import TextSet
from upcycle.errors import UpcycleError
from upcycle.tasks import Batch, Feed, Question, Task
from upcycle.tasks._labelled import as_the_head, only_source
from upcycle.tasks._tokens import refuse_beyond_positions, tokenizer_of

if TYPE_CHECKING:
    from upcycle.dense.subject import Subject
    from upcycle.training.run import Run


@dataclass(frozen=True, kw_only=True)
class TextClassification(Task):
    """Texts of one source, JSON lines or parquet, cut and padded to `train.sequence_length` tokens.

    `fields` names one text or two of a pair. `test` is the set that the model is scored on; without it,
    `data.held_out` of the texts are.
    """

    by_example = True
    unit = "text"
    summary = "the class of a text or a pair of texts"
    heads = ("ForSequenceClassification",)

    test: str | None = None  # the set that is scored on; none: data.held_out of the texts
    fields: tuple[str, ...] = ("text",)  # one column of text, or the two of a pair
    label_field: str = "label"  # column of the labels

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.fields) not in (1, 2):
            raise UpcycleError(f"task.fields names {len(self.fields)} texts; give one, or two of a pair")

    def feed(self, run: Run, subject: Subject, out: Path) -> Feed:
        source = only_source(run, self)
        train = self._texts(source, run, subject)
        test = None if self.test is None else self._texts(self.test, run, subject)
        return Examples(train, test, held_out_share=run.data.held_out, seed=run.train_seed)

    def _texts(self, path: str, run: Run, subject: Subject) -> TextSet:
        refuse_beyond_positions(run, subject)
        tokenizer = tokenizer_of(run, subject)
        if tokenizer.pad_token_id is None:
            raise UpcycleError("text classification wants a tokenizer with a pad token; set data.tokenizer")
        found = TextSet.open(
            path,
            tokenizer,
            length=run.train.sequence_length,
            fields=self.fields,
            label_field=self.label_field,
        )
        return as_the_head(found, subject)

    def question(self, batch: Batch, subject: Subject, *, training: bool) -> Question:
        names = {"input_ids": "ids", "attention_mask": "mask", "token_type_ids": "types"}
        return Question({name: batch[part] for name, part in names.items()}, batch["labels"])

    def targets(self, batch: Batch) -> int:
        return len(batch["labels"])

    def lengths(self, run: Run, subject: Subject) -> dict[str, int]:
        return {"layers": run.train.sequence_length}


task = TextClassification
