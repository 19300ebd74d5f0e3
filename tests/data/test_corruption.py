"""Corrupted spans and masked tokens: what T5 and BERT do, and a row's own affair."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle.data.corruption import SpanLengths, corrupt_spans, mask_tokens, span_lengths
from upcycle.errors import UpcycleError
from upcycle.tensors import rng

EOS, MASK, VOCABULARY = 1, 103, 30_000
SENTINELS = list(range(32_099, 31_999, -1))  # as T5 numbers <extra_id_0> to <extra_id_99>
SPECIAL = frozenset({0, 101, 102, 103})


def keys_of(rows: int) -> list[rng.Key]:
    return [rng.key(5, "corruption", row) for row in range(rows)]


def tokens_of(rows: int, length: int) -> np.ndarray:
    """Rows in which no token comes twice, and none is a sentinel or EOS."""
    return np.stack([100_000 + length * row + np.arange(length) for row in range(rows)])


def corrupted(tokens: np.ndarray, lengths: SpanLengths, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    options: dict[str, Any] = {"sentinels": SENTINELS, "eos": EOS} | changes
    made = corrupt_spans(tokens, options.pop("keys", keys_of(len(tokens))), lengths=lengths, **options)
    return made.inputs, made.targets


# --- lengths


def test_the_lengths_of_t5() -> None:
    found = span_lengths(512)
    assert (found.raw, found.inputs, found.targets) == (568, 512, 114)
    assert (found.noise, found.spans) == (85, 28)
    assert (span_lengths(1024).raw, span_lengths(1024).targets) == (1137, 229)  # 1137 * 0.15 = 170.55


@pytest.mark.parametrize("density", [0.05, 0.15, 0.3, 0.4])
@pytest.mark.parametrize("mean", [1.0, 2.5, 3.0, 8.0])
def test_no_longer_row_fits(density: float, mean: float) -> None:
    """Against a search through all lengths, and a count by hand."""
    for inputs in [3, 4, 5, 10, 33, 128, 511]:
        fits = []
        for raw in range(2, 3 * inputs):
            noise = max(1, round(raw * density))
            spans = max(1, round(noise / mean))
            if raw - noise + spans + 1 <= inputs:
                fits.append((raw, noise, spans))
        found = span_lengths(inputs, noise_density=density, mean_span=mean)
        assert (found.raw, found.noise, found.spans) == fits[-1]
        assert found.inputs == inputs
        assert found.targets == found.noise + found.spans + 1


def test_lengths_that_cannot_be() -> None:
    with pytest.raises(UpcycleError, match=r"inputs of 2 tokens; .* at least 3"):
        span_lengths(2)
    for density in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(UpcycleError, match="noise_density"):
            span_lengths(64, noise_density=density)
    for mean in (0.5, float("nan"), float("inf")):
        with pytest.raises(UpcycleError, match="mean_span"):
            span_lengths(64, mean_span=mean)
    with pytest.raises(UpcycleError, match=r"spans and keep .* lower noise_density or raise mean_span"):
        span_lengths(64, noise_density=0.8, mean_span=1.0)


# --- spans


def naive_row(
    row: list[int], key: rng.Key, noise: int, spans: int, sentinels: list[int]
) -> tuple[list[int], list[int]]:
    """One row, token by token: cuts are where the smallest draws are."""
    draws = rng.uniforms(key, 0, len(row) - 2).tolist()

    def parts(numbers: list[float]) -> list[int]:
        cuts = sorted(sorted(range(len(numbers)), key=lambda i: numbers[i])[: spans - 1])
        edges = [0, *(cut + 1 for cut in cuts), len(numbers) + 1]
        return [b - a for a, b in pairwise(edges)]

    taken, kept = parts(draws[: noise - 1]), parts(draws[noise - 1 :])
    inputs, targets, rest = [], [], list(row)
    for sentinel, stay, go in zip(sentinels, kept, taken, strict=False):
        inputs += [*rest[:stay], sentinel]
        targets += [sentinel, *rest[stay : stay + go]]
        rest = rest[stay + go :]
    assert not rest
    return [*inputs, EOS], [*targets, EOS]


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 5),
    inputs=st.integers(3, 80),
    density=st.sampled_from([0.05, 0.15, 0.4]),
    mean=st.sampled_from([1.0, 2.5, 3.0]),
)
def test_rows_are_those_of_a_naive_loop(rows: int, inputs: int, density: float, mean: float) -> None:
    lengths = span_lengths(inputs, noise_density=density, mean_span=mean)
    tokens = np.arange(rows * lengths.raw).reshape(rows, lengths.raw)
    found = corrupted(tokens, lengths)
    assert found[0].shape == (rows, inputs)
    assert found[1].shape == (rows, lengths.targets)
    assert found[0].dtype == found[1].dtype == np.int64
    for i, key in enumerate(keys_of(rows)):
        row = naive_row(tokens[i].tolist(), key, lengths.noise, lengths.spans, SENTINELS)
        assert [part[i].tolist() for part in found] == list(row)


def spans_of(row: np.ndarray) -> dict[int, list[int]]:
    """What follows each sentinel, up to the next one or EOS, which is last; what comes first is under -1."""
    assert row[-1] == EOS
    found: dict[int, list[int]] = {}
    current = found.setdefault(-1, [])
    for token in row[:-1].tolist():
        if token in SENTINELS:
            assert token not in found
            current = found.setdefault(token, [])
        else:
            current.append(token)
    return found


def test_the_row_comes_back_from_inputs_and_targets() -> None:
    lengths = span_lengths(512)
    tokens = tokens_of(200, lengths.raw)
    for row, inputs, targets in zip(tokens, *corrupted(tokens, lengths), strict=True):
        stay, go = spans_of(inputs), spans_of(targets)
        assert list(stay) == list(go) == [-1, *SENTINELS[:28]]
        assert not go[-1]
        assert not stay[SENTINELS[27]]  # the last span ends the row
        assert all(stay[mark] for mark in [-1, *SENTINELS[:27]])
        assert all(go[mark] for mark in SENTINELS[:28])
        back = [token for mark in stay for token in [*go[mark], *stay[mark]]]
        assert back == row.tolist()


def test_the_share_of_noise_and_the_mean_span() -> None:
    lengths = span_lengths(512)
    tokens = tokens_of(300, lengths.raw)
    _, targets = corrupted(tokens, lengths)
    assert ((targets >= 100_000).sum(axis=1) == round(0.15 * 568)).all()
    spans = [len(span) for row in targets for mark, span in spans_of(row).items() if mark in SENTINELS]
    assert len(spans) == 300 * 28
    assert np.mean(spans) == 85 / 28
    # Every partition alike: a part of 85 in 28 has n tokens in C(84 - n, 26) of the C(84, 27) partitions.
    for length, share in [(1, 27 / 84), (2, 27 / 84 * 57 / 83)]:
        error = (share * (1 - share) / len(spans)) ** 0.5
        assert abs(np.mean(np.array(spans) == length) - share) < 5 * error


def test_all_ways_to_cut_a_row_are_equally_likely() -> None:
    """Seven tokens, three of them noise in two spans: 2 ways for the noise, 3 for the rest."""
    lengths = SpanLengths(raw=7, noise=3, spans=2)
    rows = 6000
    inputs, _ = corrupted(np.tile(np.arange(100, 107), (rows, 1)), lengths)
    seen, counts = np.unique(inputs, axis=0, return_counts=True)
    assert len(seen) == 6
    assert (np.abs(counts - rows / 6) < 5 * (rows * 5 / 36) ** 0.5).all()


def test_a_row_depends_on_its_key_alone() -> None:
    lengths = span_lengths(64)
    tokens, keys = tokens_of(9, lengths.raw), keys_of(9)
    whole = corrupted(tokens, lengths, keys=keys)
    for part in ([4], [8, 0], [3, 3, 5]):
        again = corrupted(tokens[part], lengths, keys=[keys[i] for i in part])
        for a, b in zip(again, whole, strict=True):
            np.testing.assert_array_equal(a, b[part])
    cuts = {tuple(row < 100_000) for row in whole[0]}
    assert len(cuts) == 9
    # Where it is cut does not depend on what it says.
    other, _ = corrupted(tokens[::-1], lengths, keys=keys)
    np.testing.assert_array_equal(other < 100_000, whole[0] < 100_000)


def test_the_spans_are_pinned() -> None:
    """A run that is gone on with under a later version must see the same rows."""
    lengths = span_lengths(16, noise_density=0.3)
    inputs, targets = corrupted(np.arange(lengths.raw)[None] + 200, lengths)
    assert (inputs.tolist(), targets.tolist()) == PINNED_SPANS


PINNED_SPANS = (
    [[200, 201, 202, 32099, 208, 209, 210, 211, 212, 213, 214, 215, 216, 217, 32098, 1]],
    [[32099, 203, 204, 205, 206, 207, 32098, 218, 1]],
)


def test_sentinels_too_few() -> None:
    lengths = span_lengths(512)
    tokens = tokens_of(2, lengths.raw)
    corrupted(tokens, lengths, sentinels=SENTINELS[:28])
    with pytest.raises(UpcycleError, match=r"568 tokens have 28 spans.* has 27; shorten the rows"):
        corrupted(tokens, lengths, sentinels=SENTINELS[:27])


def test_rows_of_another_length_are_a_mistake_of_the_caller() -> None:
    lengths = span_lengths(64)
    with pytest.raises(AssertionError):
        corrupted(tokens_of(2, lengths.raw + 1), lengths)
    with pytest.raises(ValueError, match="zip"):
        corrupted(tokens_of(2, lengths.raw), lengths, keys=keys_of(1))


# --- masked tokens


def masked(tokens: np.ndarray, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    options: dict[str, Any] = {"mask_id": MASK, "vocab_size": VOCABULARY, "special_ids": SPECIAL} | changes
    made = mask_tokens(tokens, options.pop("keys", keys_of(len(tokens))), **options)
    return made.inputs, made.labels


def sentences(rows: int, length: int) -> np.ndarray:
    """Rows that begin with [CLS] and end with [SEP] and some padding."""
    tokens = np.random.default_rng(0).integers(1000, VOCABULARY, (rows, length))
    tokens[:, 0] = 101
    for row, end in zip(tokens, np.random.default_rng(1).integers(length // 2, length, rows), strict=True):
        row[end:] = 0
        row[end - 1] = 102
    return tokens


def test_masked_rows_are_those_of_a_naive_loop() -> None:
    tokens = sentences(12, 40)
    before = tokens.copy()
    inputs, labels = masked(tokens, probability=0.4)
    np.testing.assert_array_equal(tokens, before)
    assert inputs.dtype == labels.dtype == np.int64
    for i, key in enumerate(keys_of(12)):
        draws = [float(x) for x in rng.uniforms(key, 0, 80)]
        for j, token in enumerate(tokens[i].tolist()):
            wanted = (token, -100)
            if token not in SPECIAL and draws[j] < 0.4:
                hidden = MASK if draws[j] < 0.32 else token if draws[j] >= 0.36 else None
                wanted = (int(draws[40 + j] * VOCABULARY) if hidden is None else hidden, token)
            assert (inputs[i, j], labels[i, j]) == wanted


def test_the_shares_of_bert() -> None:
    tokens = sentences(1000, 128)
    inputs, labels = masked(tokens)
    free = ~np.isin(tokens, list(SPECIAL))
    chosen = labels != -100
    assert not (chosen & ~free).any()
    np.testing.assert_array_equal(labels[chosen], tokens[chosen])
    np.testing.assert_array_equal(inputs[~chosen], tokens[~chosen])

    def near(part: np.ndarray, share: float) -> bool:
        return abs(part.mean() - share) < 5 * (share * (1 - share) / part.size) ** 0.5

    assert near(chosen[free], 0.15)
    hidden, stayed = inputs[chosen] == MASK, inputs[chosen] == tokens[chosen]
    assert near(hidden, 0.8)
    assert near(stayed, 0.1)
    others = inputs[chosen][~hidden & ~stayed]
    assert others.min() >= 0
    assert others.max() < VOCABULARY
    for quarter in range(4):
        assert near(others * 4 // VOCABULARY == quarter, 0.25)
    # Places and replacements have nothing to do with each other.
    assert near(chosen[:, 1:60], 0.15)
    assert near(chosen[:, 1:59] & chosen[:, 2:60], 0.15**2)


def test_masks_depend_on_the_key_alone() -> None:
    tokens, keys = sentences(9, 64), keys_of(9)
    whole = masked(tokens, keys=keys)
    for part in ([4], [8, 0], [3, 3, 5]):
        again = masked(tokens[part], keys=[keys[i] for i in part])
        for a, b in zip(again, whole, strict=True):
            np.testing.assert_array_equal(a, b[part])
    # A token that is not special is chosen or not, whatever it and its neighbours are.
    _, labels = masked(np.full_like(tokens, 2000), keys=keys)
    free = ~np.isin(tokens, list(SPECIAL))
    np.testing.assert_array_equal((labels != -100)[free], (whole[1] != -100)[free])
    assert len({tuple(row) for row in labels}) == 9


def test_the_masks_are_pinned() -> None:
    inputs, labels = masked(np.arange(12)[None] + 2000, probability=0.5)
    assert (inputs.tolist(), labels.tolist()) == PINNED_MASKS


PINNED_MASKS = (
    [[103, 2001, 103, 103, 103, 103, 2006, 103, 103, 103, 2010, 2011]],
    [[2000, -100, 2002, 2003, 2004, 2005, -100, 2007, 2008, 2009, 2010, -100]],
)


def test_everything_or_nothing_to_mask() -> None:
    tokens = np.full((2, 30), 2000)
    _, labels = masked(tokens, probability=1.0, special_ids=frozenset())
    np.testing.assert_array_equal(labels, tokens)
    for nothing in (np.zeros((2, 30), np.int64), np.empty((0, 30), np.int64), np.empty((2, 0), np.int64)):
        inputs, labels = masked(nothing)
        np.testing.assert_array_equal(inputs, nothing)
        assert (labels == -100).all()


def test_masks_that_cannot_be() -> None:
    for probability in (0.0, 1.1, float("nan")):
        with pytest.raises(UpcycleError, match=f"probability = {probability}; .* at most 1"):
            masked(sentences(1, 8), probability=probability)
    with pytest.raises(UpcycleError, match="id 103 and the embedding 100 rows"):
        masked(sentences(1, 8), vocab_size=100)
    with pytest.raises(ValueError, match="zip"):
        masked(sentences(2, 8), keys=keys_of(3))
