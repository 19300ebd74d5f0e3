"""Corruption for denoising objectives: T5's corrupted spans and BERT's masked tokens.

Each row is corrupted with random numbers from its own key, so that it is the same in any batch, on any rank
and after any restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from upcycle.errors import UpcycleError
from upcycle.tensors import rng

IGNORED = -100  # the label of positions without a prediction


@dataclass(frozen=True, kw_only=True)
class SpanLengths:
    """The lengths for a row of `raw` tokens, `noise` of which move to the targets in `spans` spans."""

    raw: int
    noise: int
    spans: int

    @property
    def kept(self) -> int:
        """The number of tokens that stay in the inputs."""
        return self.raw - self.noise

    @property
    def inputs(self) -> int:
        """The length of the inputs: the kept tokens, one sentinel per span, and EOS."""
        return self.kept + self.spans + 1

    @property
    def targets(self) -> int:
        """The length of the targets: the removed tokens, one sentinel per span, and EOS."""
        return self.noise + self.spans + 1


@dataclass(frozen=True, kw_only=True)
class Corrupted:
    """Rows with their spans removed, and the targets made of the spans."""

    inputs: np.ndarray  # int64 [N, I]
    targets: np.ndarray  # int64 [N, T]


@dataclass(frozen=True, kw_only=True)
class Masked:
    """Rows with some tokens hidden; the labels are the hidden tokens, and `IGNORED` elsewhere."""

    inputs: np.ndarray  # int64 [N, L]
    labels: np.ndarray  # int64 [N, L]


def span_lengths(inputs: int, *, noise_density: float = 0.15, mean_span: float = 3.0) -> SpanLengths:
    """Return the lengths for the longest row whose inputs fit into `inputs` tokens; they fill it.

    Raises `UpcycleError` if there is no such row, or if an argument is out of range.
    """
    if inputs < 3:
        raise UpcycleError(
            f"inputs of {inputs} tokens; corrupted spans need at least 3: a token, a sentinel and EOS"
        )
    if not 0 < noise_density < 1:
        raise UpcycleError(f"noise_density = {noise_density}; it must be greater than 0 and less than 1")
    if not 1 <= mean_span < float("inf"):
        raise UpcycleError(f"mean_span = {mean_span}; it must be 1 or more tokens")
    # One more token in a row adds at most one to its inputs, and there is at most one sentinel per token.
    raw = inputs - 1
    while _lengths(raw + 1, noise_density, mean_span).inputs <= inputs:
        raw += 1
    found = _lengths(raw, noise_density, mean_span)
    if found.spans > found.kept:
        raise UpcycleError(
            f"noise_density = {noise_density} and mean_span = {mean_span} make {found.spans} spans and keep "
            f"{found.kept} tokens to stand between them; lower noise_density or raise mean_span"
        )
    return found


def _lengths(raw: int, noise_density: float, mean_span: float) -> SpanLengths:
    noise = min(max(round(raw * noise_density), 1), raw - 1)
    return SpanLengths(raw=raw, noise=noise, spans=max(round(noise / mean_span), 1))


def corrupt_spans(
    tokens: np.ndarray, keys: Sequence[rng.Key], *, lengths: SpanLengths, sentinels: Sequence[int], eos: int
) -> Corrupted:
    """Move random spans of the rows `tokens`, int64 [N, raw], to the targets.

    `keys` has one key per row. A row begins with kept tokens and ends with a span, and all such ways to cut
    it are equally likely. `sentinels` are the ids that replace the first span, the second, and so on. Raises
    `UpcycleError` if there are fewer sentinels than spans.
    """
    rows = len(tokens)
    assert tokens.shape == (rows, lengths.raw)
    if len(sentinels) < lengths.spans:
        raise UpcycleError(
            f"rows of {lengths.raw} tokens have {lengths.spans} spans, each with a sentinel of its own, and "
            f"the tokenizer has {len(sentinels)}; shorten the rows, raise mean_span or lower noise_density"
        )
    draws = _uniforms(keys, rows, lengths.raw - 2)
    taken = _segments(draws[:, : lengths.noise - 1], lengths.spans)
    kept = _segments(draws[:, lengths.noise - 1 :], lengths.spans)

    parts = np.stack([kept, taken], axis=2).ravel()
    noise = np.repeat(np.tile([False, True], rows * lengths.spans), parts).reshape(tokens.shape)
    marks = np.asarray(sentinels[: lengths.spans], np.int64)
    inputs = _joined(tokens[~noise], np.cumsum(kept + 1, axis=1) - 1, marks, eos, lengths.inputs)
    targets = _joined(tokens[noise], np.cumsum(taken + 1, axis=1) - taken - 1, marks, eos, lengths.targets)
    return Corrupted(inputs=inputs, targets=targets)


def _uniforms(keys: Sequence[rng.Key], rows: int, n: int) -> np.ndarray:
    """Return the first `n` random numbers of each row's key, float32 [N, n]."""
    draws = np.empty((rows, n), np.float32)
    for row, key in zip(draws, keys, strict=True):
        row[:] = rng.uniforms(key, 0, n)
    return draws


def _segments(draws: np.ndarray, parts: int) -> np.ndarray:
    """Return random lengths of `parts` non-empty parts, [N, parts]; they sum to the draws of a row + 1."""
    cuts = np.sort(np.argsort(draws, axis=1, kind="stable")[:, : parts - 1], axis=1) + 1
    return np.diff(cuts, axis=1, prepend=0, append=draws.shape[1] + 1)


def _joined(tokens: np.ndarray, places: np.ndarray, marks: np.ndarray, eos: int, length: int) -> np.ndarray:
    """Build rows of `length` with `marks` at `places`, EOS at the end, and `tokens` in order elsewhere."""
    out = np.empty((len(places), length), np.int64)
    free = np.ones(out.shape, bool)
    np.put_along_axis(free, places, False, axis=1)
    np.put_along_axis(out, places, np.broadcast_to(marks, places.shape), axis=1)
    free[:, -1], out[:, -1] = False, eos
    out[free] = tokens
    return out


def mask_tokens(
    tokens: np.ndarray,
    keys: Sequence[rng.Key],
    *,
    probability: float = 0.15,
    mask_id: int,
    vocab_size: int,
    special_ids: frozenset[int],
) -> Masked:
    """Choose random tokens of the rows `tokens`, int64 [N, L], for prediction, and mask them.

    `keys` has one key per row. Each token that is not special is chosen with `probability`. Of the chosen
    tokens, 80% become `mask_id`, 10% a random id of the vocabulary, and 10% stay. Raises `UpcycleError` for
    an invalid probability or `mask_id`.
    """
    if not 0 < probability <= 1:
        raise UpcycleError(f"probability = {probability}; it must be greater than 0 and at most 1")
    if not 0 <= mask_id < vocab_size:
        raise UpcycleError(
            f"the mask token has id {mask_id} and the embedding {vocab_size} rows, which do not belong "
            f"together; use the tokenizer of the model"
        )
    rows, length = tokens.shape
    draws = _uniforms(keys, rows, 2 * length).astype(np.float64)
    places, others = draws[:, :length], (draws[:, length:] * vocab_size).astype(np.int64)
    special = np.isin(tokens, np.fromiter(special_ids, np.int64))
    inputs = np.where(places < 0.9 * probability, others, tokens)
    inputs[places < 0.8 * probability] = mask_id
    labels = np.where((places < probability) & ~special, tokens, IGNORED)
    return Masked(inputs=np.where(special, tokens, inputs), labels=labels)
