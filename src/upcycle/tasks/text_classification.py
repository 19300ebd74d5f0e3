"""Text classification: predict the class of a text or a pair of texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.data.corpus import Data
from upcycle.data.documents import PLAIN, Source, kind
from upcycle.data.feeding import Feed, Feeding
from upcycle.data.texts import TextSet
from upcycle.errors import UpcycleError
from upcycle.tasks import Batch, Question, Task
from upcycle.tasks._decoder_inputs import behind_start, mask_behind_start
from upcycle.tasks._labelled import as_the_head, objection_to, only_source, refuse_unknown_ids, split
from upcycle.tasks._positions import refuse_beyond_positions
from upcycle.tasks._tokens import tokenizer_of

if TYPE_CHECKING:
    from upcycle.dense.subject import Subject


@dataclass(frozen=True, kw_only=True)
class TextClassification(Task):
    """Texts from one source of JSON lines or parquet, cut and padded to `train.sequence_length` tokens.

    `fields` names one column of text, or the two of a pair. The model is scored on the set `test`; without
    it, on the share `data.held_out` of the texts.
    """

    by_example = True
    splits = True
    unit = "text"
    summary = "the class of a text or a pair of texts"
    heads = ("ForSequenceClassification",)
    auto = "AutoModelForSequenceClassification"

    test: str | None = None  # the set to score on; none: data.held_out of the texts
    fields: tuple[str, ...] = ("text",)  # one column of text, or the two of a pair
    label_field: str = "label"  # column of the labels

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.fields) not in (1, 2):
            raise UpcycleError(f"task.fields names {len(self.fields)} texts; give one, or two of a pair")

    def feed(self, feeding: Feeding, subject: Subject) -> Feed:
        source = only_source(feeding, self).path
        train = self._texts(source, feeding, subject)
        test = None if self.test is None else self._texts(self.test, feeding, subject)
        return split(train, test, feeding)

    def objection(self, data: Data) -> str | None:
        test = None if self.test is None else Source(path=self.test)
        return objection_to(data, self, test, ("field", "separator", "split", "append_eos"))

    def _texts(self, path: str, feeding: Feeding, subject: Subject) -> TextSet:
        refuse_beyond_positions(feeding.length, subject, setting=feeding.setting)
        tokenizer = tokenizer_of(feeding, subject)
        if tokenizer.pad_token_id is None:
            raise UpcycleError(
                "text classification wants a tokenizer with a pad token; in a run, set data.tokenizer"
            )
        found = TextSet.open(
            path,
            tokenizer,
            length=feeding.length,
            fields=self.fields,
            label_field=self.label_field,
        )
        refuse_unknown_ids(found.ids, path, subject)
        _refuse_uneven_ends(found, subject)
        return as_the_head(found, subject, self.classes)

    def question(self, batch: Batch, subject: Subject, *, training: bool) -> Question:
        inputs = {"input_ids": batch["ids"], "attention_mask": batch["mask"]}
        if subject.settings.get("type_vocab_size"):
            inputs["token_type_ids"] = batch["types"]
        if _has_decoder(subject):
            inputs["decoder_input_ids"] = behind_start(batch["ids"], subject)
            inputs["decoder_attention_mask"] = mask_behind_start(batch["mask"])
        return Question(inputs, batch["labels"])

    def targets(self, batch: Batch) -> int:
        return len(batch["labels"])

    def lengths(self, length: int, subject: Subject) -> dict[str, int]:
        return subject.all_of(length)

    def can_read(self, path: Path) -> bool:
        return kind(path) not in PLAIN  # these have no labels

    def unscored(self, architecture: str) -> str | None:
        return f"{architecture} classifies texts; score it in a run, with task.test"


def _has_decoder(subject: Subject) -> bool:
    return "decoder" in subject.all_of(1)


def _refuse_uneven_ends(found: TextSet, subject: Subject) -> None:
    """Refuse texts without the end token that T5 and BART read the class at; they want equally many."""
    if not _has_decoder(subject):
        return
    end = subject.settings.get("eos_token_id")
    counts = (found.ids == end).sum(1)
    least, most = int(counts.min()), int(counts.max())
    if least < 1 or least != most:
        raise UpcycleError(
            f"{subject.architecture} reads the class at the last end token (id {end}), of which every text "
            f"must have equally many and at least one; those of {found.name} have {least} to {most}; take it "
            f"out of the texts, or in a run, set data.tokenizer to one that ends every text with it"
        )


task = TextClassification
