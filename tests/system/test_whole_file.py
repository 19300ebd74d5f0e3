"""Small files that are whole or as they were."""

from __future__ import annotations

import json
import os

import pytest

from upcycle.system import whole_file


def test_a_file_is_made_with_its_folder_and_replaced(tmp_path):
    path = tmp_path / "a" / "b.json"
    for value in ({"x": 1}, {"x": [1.5, None, "ü"]}):
        whole_file.write_json(path, value)
        assert json.loads(path.read_text()) == value
        assert path.read_bytes().endswith(b"\n")
    whole_file.write_text(path, "ü")
    assert path.read_bytes() == "ü".encode()
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_what_was_there_stays_if_the_new_file_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    whole_file.write_text(path, "before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        whole_file.write_text(path, "after")
    assert raised.value.filename == str(path)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
