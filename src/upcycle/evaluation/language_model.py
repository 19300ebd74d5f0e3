"""A language model for evaluation: the likelihood of continuations, and greedy generation.

It works for decoders and encoder-decoders. A pair is a context and a continuation, as token ids. A decoder
reads both as one row; an encoder-decoder reads the context in its encoder and the continuation in its
decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria

from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.evaluation.batch_size import BatchSize
from upcycle.evaluation.no_numbers import RefuseNaN, refuse_nan
from upcycle.families import CAUSAL_HEADS

Advance = Callable[[int], None]

# Ends of the names of classes that give a text a likelihood.
ENCODER_DECODER = "ForConditionalGeneration"
SPEAKING = (*CAUSAL_HEADS, ENCODER_DECODER)


@dataclass(frozen=True, eq=False)
class Pair:
    """The token ids of a context and of its continuation; both must have at least one."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True, eq=False)
class Likelihood:
    """The likelihood of each of N tokens of a continuation.

    `nats` is minus the logarithm of the probability, float64 [N]; `likeliest` tells whether the token had the
    largest probability, bool [N].
    """

    nats: np.ndarray
    likeliest: np.ndarray


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any
    subject: Subject
    length: int | None  # the most tokens it can read at once; None: no limit
    size: BatchSize
    shared: bool = False  # whether other processes hold parts of the model, and run the same calls

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: Any, subject: Subject, *, batch_size: int = 0
    ) -> LanguageModel:
        """Make a language model; `batch_size` is the number of rows of a forward pass (0: automatic)."""
        if not subject.architecture.endswith(SPEAKING):
            raise UpcycleError(
                f"{subject.architecture} gives no text a likelihood; take a checkpoint of a class that "
                f"ends in {' or '.join(SPEAKING)}"
            )
        return cls(
            model=model.eval(),
            tokenizer=tokenizer,
            subject=subject,
            length=subject.positions,
            size=BatchSize.of(subject.settings, model.device, fixed=batch_size),
        )

    @property
    def encoder_decoder(self) -> bool:
        """Return whether the model has an encoder for the context."""
        return self.subject.architecture.endswith(ENCODER_DECODER)

    @property
    def begin(self) -> int:
        """The id of the token before a text: BOS, or EOS if there is no BOS."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise UpcycleError(
            f"the tokenizer of {self.subject.folder} has neither BOS nor EOS, so the first token of a "
            "text has nothing before it; name one in its tokenizer_config.json"
        )

    @property
    def _filler(self) -> int:
        """The id that fills padded positions."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id or 0) if pad is None else int(pad)

    @torch.no_grad()  # in inference mode FSDP would gather parameters that cannot be trained afterwards
    def likelihoods(self, pairs: Sequence[Pair], advance: Advance = lambda n: None) -> list[Likelihood]:
        """Return the likelihood of the continuation of each pair.

        A pair that is too long for the model loses its first tokens: those of the context, then those of the
        continuation. An encoder-decoder reads the two apart, and each loses its own first tokens. The
        likelihood is then that of the remaining tokens. Raises `NoNumbersError` if the model gives NaN.
        """
        pairs = [self._kept(pair) for pair in pairs]
        order = sorted(range(len(pairs)), key=lambda i: -_length(pairs[i]))
        work = self._encoder_decoder if self.encoder_decoder else self._decoder
        found = self.size.over([pairs[i] for i in order], work, length=_length, advance=advance)
        out: list[Likelihood] = [found[0]] * len(pairs) if pairs else []
        for place, likelihood in zip(order, found, strict=True):
            out[place] = likelihood
        return out

    def too_long(self, pair: Pair) -> bool:
        """Return whether a continuation alone is longer than the model can read at once."""
        return self.length is not None and len(pair.continuation) > self.length

    def _kept(self, pair: Pair) -> Pair:
        if self.length is None:
            return pair
        if self.encoder_decoder:
            return Pair(pair.context[-self.length :], pair.continuation[-self.length :])
        if not self.too_long(pair):
            return pair
        kept = len(pair.continuation) - self.length
        return Pair(pair.continuation[kept - 1 : kept], pair.continuation[kept:])

    def _decoder(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        rows = [[*pair.context, *pair.continuation] for pair in pairs]
        if self.length is not None:
            rows = [row[-self.length - 1 :] for row in rows]
        ids, mask = self._padded([row[:-1] for row in rows])
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        ends = [len(row) - 1 for row in rows]
        parts = [
            logits[i, end - len(p.continuation) : end]
            for i, (end, p) in enumerate(zip(ends, pairs, strict=True))
        ]
        return [self._likelihood(part, pair.continuation) for part, pair in zip(parts, pairs, strict=True)]

    def _encoder_decoder(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        ids, mask = self._padded([list(pair.context) for pair in pairs])
        start = self.model.config.decoder_start_token_id
        start = self._filler if start is None else start
        # The padding is at the right and the decoder is causal, so that no mask is needed.
        shifted, _ = self._padded([[start, *pair.continuation[:-1]] for pair in pairs])
        found = self.model(input_ids=ids, attention_mask=mask, decoder_input_ids=shifted, use_cache=False)
        return [
            self._likelihood(logits[: len(pair.continuation)], pair.continuation)
            for logits, pair in zip(found.logits, pairs, strict=True)
        ]

    def _likelihood(self, logits: Tensor, ids: Sequence[int]) -> Likelihood:
        """Return the likelihood of `ids` [N] from the `logits` [N, V] of the positions before them."""
        wanted = torch.tensor(ids, device=logits.device)
        nats = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
        refuse_nan(nats, self.subject)
        likeliest = logits.argmax(-1) == wanted
        return Likelihood(nats.double().cpu().numpy(), likeliest.cpu().numpy())

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        most: int,
        until: Sequence[str] = (),
        advance: Advance = lambda n: None,
    ) -> list[str]:
        """Return the greedy continuation of each prompt.

        A prompt that is too long for the model loses its first tokens. A continuation has at most `most`
        tokens and is cut before EOS and before any of the strings `until`.
        Raises `NoNumbersError` if the model gives NaN.
        """
        room = self._room(most)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))

        def work(rows: Sequence[Sequence[int]]) -> list[str]:
            return self._generate([list(row)[-room:] if room else list(row) for row in rows], most, until)

        def length(row: Sequence[int]) -> int:
            return len(row) + most

        out = [""] * len(prompts)
        made = self.size.over([prompts[i] for i in order], work, length=length, advance=advance)
        for place, text in zip(order, made, strict=True):
            out[place] = text
        return out

    def _room(self, most: int) -> int | None:
        """Return how many tokens a prompt may have if `most` are generated; None: any number."""
        if self.length is None:
            return None
        room = self.length if self.encoder_decoder else self.length - most
        if room < 1 or most > self.length:
            raise UpcycleError(
                f"{most} tokens are to be generated and the model has {self.length} positions; lower the "
                "number"
            )
        return room

    def _generate(self, rows: list[list[int]], most: int, until: Sequence[str]) -> list[str]:
        # A decoder continues at the right, so that its padding must be at the left.
        ids, mask = self._padded(rows, left=not self.encoder_decoder)
        skip = 1 if self.encoder_decoder else ids.shape[1]
        stop = [_Until(self.tokenizer, until, skip)] if until else []
        made = self.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=most,
            pad_token_id=self._filler, eos_token_id=self.tokenizer.eos_token_id, stopping_criteria=stop,
            logits_processor=[RefuseNaN(self.subject)],
            synced_gpus=self.shared,  # no process stops before the others
        )  # fmt: skip
        texts = self.tokenizer.batch_decode(made[:, skip:], skip_special_tokens=True)
        return [_before(text, until) for text in texts]

    def _padded(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Pad the rows to one length; return them and their mask (1 for real tokens), both int64 [B, L]."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self._filler)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), 1
        return ids.to(self.model.device), mask.to(self.model.device)


def _length(pair: Pair) -> int:
    return len(pair.context) + len(pair.continuation)


class _Until(StoppingCriteria):
    """A stopping criterion: a row ends when its new text contains one of some strings."""

    def __init__(self, tokenizer: Any, until: Sequence[str], skip: int) -> None:
        self._tokenizer, self._until, self._skip = tokenizer, until, skip

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._skip :], skip_special_tokens=True)
        found = [any(end in text for end in self._until) for text in texts]
        return torch.tensor(found, device=input_ids.device)


def _before(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.split(end)[0]
    return text
