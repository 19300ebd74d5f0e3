"""T5's pretraining: predict spans removed from a text (Raffel et al. 2020, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from upcycle.data.corpus import Data
from upcycle.data.corruption import SpanLengths, corrupt_spans, span_lengths
from upcycle.data.feeding import Feed, Feeding
from upcycle.errors import UpcycleError
from upcycle.settings import AtLeast, Within
from upcycle.tasks import Batch, Question, Task
from upcycle.tasks._decoder_inputs import behind_start
from upcycle.tasks._tokens import (
    TokenFeed,
    objection_to_sources,
    refuse_sound,
    tokenizer_of,
)
from upcycle.tensors import rng

if TYPE_CHECKING:
    from upcycle.dense.subject import Subject


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(Task):
    """A share `noise_density` of the tokens is removed, in spans of `mean_span` tokens on average.

    The encoder reads `train.sequence_length` tokens. Rows are packed and all have this length.
    """

    summary = "the spans cut out of a text (T5)"
    heads = ("ForConditionalGeneration",)
    bodies = ("T5Model",)

    noise_density: Annotated[float, Within("(0, 1)")] = 0.15  # share of the tokens that is removed
    mean_span: Annotated[float, AtLeast(1)] = 3.0  # average number of tokens per span

    def spans(self, length: int) -> SpanLengths:
        """Return the lengths of texts, inputs and targets if the encoder reads `length` tokens."""
        return span_lengths(length, noise_density=self.noise_density, mean_span=self.mean_span)

    def objection(self, data: Data) -> str | None:
        return objection_to_sources(data)

    def feed(self, feeding: Feeding, subject: Subject) -> Feed:
        refuse_sound(subject)
        lengths = self.spans(feeding.length)
        tokenizer = tokenizer_of(feeding, subject)
        sentinels, eos = _sentinels(tokenizer), tokenizer.eos_token_id
        if eos is None or len(sentinels) < lengths.spans:
            raise UpcycleError(
                f"span corruption of {feeding.length} tokens wants EOS and {lengths.spans} "
                f"sentinels (<extra_id_0>, ...), and the tokenizer has {len(sentinels)}; shorten "
                f"{feeding.setting}, or in a run, set data.tokenizer"
            )

        def make(rows: np.ndarray, keys: Sequence[rng.Key]) -> dict[str, np.ndarray]:
            made = corrupt_spans(rows[:, :-1], keys, lengths=lengths, sentinels=sentinels, eos=eos)
            return {"inputs": made.inputs, "targets": made.targets}

        return TokenFeed(replace(feeding, length=lengths.raw), subject, make)

    def question(self, batch: Batch, subject: Subject, *, training: bool) -> Question:
        targets = batch["targets"]
        shifted = behind_start(targets, subject)
        given = {"input_ids": batch["inputs"], "decoder_input_ids": shifted, "use_cache": False}
        return Question(given, targets)

    def targets(self, batch: Batch) -> int:
        return batch["targets"].numel()

    def lengths(self, length: int, subject: Subject) -> dict[str, int]:
        refuse_sound(subject)
        lengths = self.spans(length)
        return {"encoder": lengths.inputs, "decoder": lengths.targets}


def _sentinels(tokenizer: Any) -> list[int]:
    """Return the ids of <extra_id_0>, <extra_id_1>, ..., as far as they exist."""
    vocabulary = tokenizer.get_vocab()
    out: list[int] = []
    while (name := f"<extra_id_{len(out)}>") in vocabulary:
        out.append(int(vocabulary[name]))
    return out


task = SpanCorruption
