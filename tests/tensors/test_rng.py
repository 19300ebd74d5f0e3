"""The stream of random numbers: the same everywhere, in any order, and really normal."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle.tensors import rng

KEY = rng.key(0, "layers.3.mlp", "gate", "redrawn", 5)


def test_the_stream_is_pinned():
    """These bytes are what published checkpoints were made with; a change of them is a new format."""
    assert KEY == (0x369C190803D014DE, 0x57B931BD86297DC7)
    digest = hashlib.sha256(rng.normals(KEY, 0, 100_000).tobytes()).hexdigest()
    assert digest == "189a111eae3ecfad58553c5aea4b7e0a39c7373bc4d3e54522c7328d3d979538"


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3 * rng.BLOCK), st.integers(0, 3 * rng.BLOCK))
def test_any_range_is_cut_from_the_whole(a, b):
    a, b = sorted((a, b))
    for draw in (rng.normals, rng.uniforms):
        whole = draw(KEY, 0, 3 * rng.BLOCK)
        assert (draw(KEY, a, b) == whole[a:b]).all()


def test_normals_are_normal():
    """Moments within five standard errors, and a Kolmogorov-Smirnov distance below the 1e-6 quantile."""
    from math import erf

    n = 1 << 20
    draws = rng.normals(KEY, 0, n).astype(np.float64)
    assert abs(draws.mean()) < 5 / n**0.5
    assert abs(draws.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((draws**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((draws**4).mean() - 3) < 5 * (96 / n) ** 0.5
    grid = np.linspace(-4, 4, 1001)
    cdf = np.array([0.5 * (1 + erf(x / 2**0.5)) for x in grid])
    empirical = np.searchsorted(np.sort(draws), grid) / n
    assert np.abs(empirical - cdf).max() < 2.7 / n**0.5


def test_streams_do_not_touch():
    """Neighbouring blocks, keys and seeds are uncorrelated."""
    a = rng.normals(KEY, 0, 1 << 18)
    b = rng.normals(rng.key(0, "layers.3.mlp", "gate", "redrawn", 6), 0, 1 << 18)
    c = rng.normals(rng.key(1, "layers.3.mlp", "gate", "redrawn", 5), 0, 1 << 18)
    for x, y in ((a, b), (a, c), (a[: rng.BLOCK], a[rng.BLOCK : 2 * rng.BLOCK])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / len(x) ** 0.5


def test_scale_shift_and_cast():
    import ml_dtypes

    plain = rng.normals(KEY, 5, 70_000)
    scaled = rng.normals(KEY, 5, 70_000, mean=0.5, std=0.25, dtype=np.dtype(ml_dtypes.bfloat16))
    assert (scaled == (plain * np.float32(0.25) + np.float32(0.5)).astype(ml_dtypes.bfloat16)).all()


def test_permutation_is_one():
    order = rng.permutation(KEY, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert (order == rng.permutation(KEY, 1000)).all()
    assert (order != np.arange(1000)).any()


def test_keys_tell_names_apart():
    names = [(0, "a", "b"), (0, "ab"), (0, "a", "b", 0), (1, "a", "b"), (0, "b", "a")]
    assert len({rng.key(seed, *rest) for seed, *rest in names}) == len(names)
