"""Attacks on the file format: whatever the bytes, an UpcycleError or the truth, never anything else."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from upcycle.checkpoints.checkpoint import Checkpoint, file_hash
from upcycle.checkpoints.header import read_header
from upcycle.errors import UpcycleError

BASE = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)})


def accepted(path) -> dict | None:
    try:
        return read_header(path)
    except UpcycleError:
        return None


@settings(max_examples=400, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(BASE) - 1), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 16),
)
def test_flipped_bytes(edits, cut, tmp_path_factory):
    raw = bytearray(BASE)
    for place, value in edits:
        raw[place] = value
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(raw[: len(raw) - cut])
    ours = accepted(path)
    try:
        with safe_open(path, "np") as theirs:
            names = set(theirs.keys())
            shapes = {n: tuple(theirs.get_slice(n).get_shape()) for n in names}
    except SafetensorError:
        shapes = None
    if ours is not None:  # what we take, safetensors takes, and sees the same in it
        assert shapes == {n: t.shape for n, t in ours.items()}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I8", "Q"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 70), max_size=3) | json_values,
    },
)


@settings(max_examples=150, deadline=None)
@given(header=st.dictionaries(st.text(max_size=4), entries | json_values, max_size=3) | json_values)
def test_any_json_as_a_header(header, tmp_path_factory):
    text = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    found = accepted(path)
    if found is not None:
        for info in found.values():
            assert info.offset >= 8 + len(text)
            assert info.offset + info.nbytes <= path.stat().st_size


@pytest.mark.parametrize("metadata", [0, False, "", [], {"a": 1}, None, {}, {"a": "b"}])
def test_metadata_is_what_safetensors_takes(metadata, tmp_path):
    text = json.dumps({"__metadata__": metadata}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    theirs = True
    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError:
        theirs = False
    if theirs:
        read_header(path)
        return
    with pytest.raises(UpcycleError, match="__metadata__ of the header holds a value that is not text"):
        read_header(path)


def test_reads_are_slices(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(BASE)
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as opened:
        info = opened.tensors["a"]
        assert opened.pread(info, 4, 20).view(np.float32).tolist() == [1, 2, 3, 4]


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(BASE)
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as opened:
        (tmp_path / "model.safetensors").write_bytes(BASE[:-20])
        last = max(opened.tensors.values(), key=lambda t: t.offset)
        with pytest.raises(UpcycleError, match="it has changed"):
            opened.pread(last, 0, last.nbytes)


def test_hash_is_sha256(tmp_path):
    import hashlib

    (tmp_path / "x").write_bytes(BASE * 100_000)
    assert file_hash(tmp_path / "x") == hashlib.sha256(BASE * 100_000).hexdigest()
