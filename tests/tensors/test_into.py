"""`into` writes what `read` returns, for every kind of lazy tensor, and reads no more than it must."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.dtypes import FLOATS
from upcycle.checkpoints.header import read_header
from upcycle.errors import UpcycleError
from upcycle.tensors import rng
from upcycle.tensors.computed import Affine, Drawn, Fill, Mean
from upcycle.tensors.lazy import Lazy, Stored
from upcycle.tensors.moved import Concat, Folded, Pick, Slice, Stack, Take
from upcycle.tensors.positions import Given


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    random = np.random.default_rng(0)
    tensors = {
        "matrix": random.standard_normal((24, 40), dtype=np.float32),
        "other": random.standard_normal((24, 40), dtype=np.float32),
        "cube": random.standard_normal((3, 24, 40), dtype=np.float32),
        "narrow": random.standard_normal((24, 40)).astype(FLOATS["F16"]),
        "wide": random.standard_normal((9, 5000), dtype=np.float32),  # a row is longer than a page
    }
    save_file(tensors, folder / "model.safetensors")
    infos = read_header(folder / "model.safetensors")
    with Checkpoint(folder, {}, infos) as checkpoint:
        yield {name: Stored(checkpoint, info) for name, info in infos.items()}


def kinds(stored: dict[str, Stored]) -> dict[str, Lazy]:
    matrix, other = stored["matrix"], stored["other"]
    order = Given((20, 3, 4, 5, 11))
    return {
        "stored": matrix,
        "cast": stored["narrow"],
        "cube": stored["cube"],
        "wide": stored["wide"],
        "slice of rows": Slice(matrix, 0, 4, 20),
        "slice of columns": Slice(stored["wide"], 1, 100, 4900),
        "take rows": Take(matrix, 0, order),
        "take columns": Take(matrix, 1, order),
        "rows after rows": Concat((matrix, Slice(other, 0, 2, 9)), 0),
        "columns after columns": Concat((matrix, other), 1),
        "stack": Stack((matrix, Affine(other, 2.0, 1.0), Fill((24, 40), "F32", 3.0))),
        "stack of pairs": Stack((Concat((matrix, other), 0), Concat((other, matrix), 0))),
        "pick": Pick(stored["cube"], 1),
        "folded": Folded(matrix, (2, 4, 5)),
        "mean": Mean((matrix, other)),
        "drawn": Drawn((24, 40), "F32", "normal", 1.0, rng.key(0, "x")),
    }


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_into_writes_what_read_returns(opened, data):
    for name, lazy in kinds(opened).items():
        starts = [data.draw(st.integers(0, n - 1)) for n in lazy.shape]
        stops = [data.draw(st.integers(a + 1, n)) for a, n in zip(starts, lazy.shape, strict=True)]
        index = tuple(zip(starts, stops, strict=True))
        for dtype in ("F32", "BF16"):
            shape = tuple(b - a for a, b in index)
            # Into a whole array, and into the middle of a larger one.
            for out in (np.zeros(shape, FLOATS[dtype]), _middle(shape, FLOATS[dtype])):
                lazy.into(index, out, dtype)
                assert np.array_equal(out, lazy.read(index, dtype)), (name, index, dtype)


def _middle(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.zeros([n + 2 for n in shape], dtype)[tuple(slice(1, 1 + n) for n in shape)]


def test_long_runs_are_read_alone_and_short_ones_with_their_rows(opened, monkeypatch):
    read: list[int] = []
    original = Checkpoint.read_into
    monkeypatch.setattr(
        Checkpoint, "read_into", lambda *given: (read.append(given[-1].nbytes), original(*given))[1]
    )
    wide, out = opened["wide"], np.zeros((9, 2000), np.float32)
    wide.into(((0, 9), (1000, 3000)), out, "F32")
    assert read == [8000] * 9
    read.clear()
    wide.into(((2, 7), (0, 5000)), np.zeros((5, 5000), np.float32), "F32")
    assert read == [5 * 20000]
    read.clear()
    wide.into(((0, 9), (1000, 1010)), np.zeros((9, 10), np.float32), "F32")
    assert sum(read) == 9 * 20000


def test_nan_is_refused_wherever_it_lies(tmp_path):
    values = np.zeros((8, 300_000), np.float32)
    values[5, 299_999] = np.nan
    save_file({"x": values}, tmp_path / "model.safetensors")
    infos = read_header(tmp_path / "model.safetensors")
    with Checkpoint(tmp_path, {}, infos) as checkpoint:
        lazy, out = Stored(checkpoint, infos["x"]), np.zeros_like(values)
        lazy.into(((0, 5), (0, 300_000)), out[:5], "F32")
        with pytest.raises(UpcycleError, match=r"x in .* holds NaN or inf"):
            lazy.into(((0, 8), (0, 300_000)), out, "F32")
        assert np.array_equal(out[:5], values[:5])
