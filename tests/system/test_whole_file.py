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


def test_a_file_that_is_filled_has_its_name_at_the_end_and_leaves_nothing_after_an_error(tmp_path):
    path = tmp_path / "a" / "b.bin"
    with whole_file.filling(path) as file:
        file.write(b"one")
        assert not path.exists()

    def broken() -> None:
        with whole_file.filling(path) as file:
            file.write(b"two")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert path.read_bytes() == b"one"
    assert [p.name for p in path.parent.iterdir()] == ["b.bin"]


def test_leftovers_of_one_file_go_and_those_of_others_stay(tmp_path):
    mine = "7-0123abcd.partial"  # as `making` ends the name of a half-written file
    names = [
        "a[1].bin",
        "a[1].bin.partial",
        f"a1.bin.{mine}",
        f"a[1].bin.partial.{mine}",
        "a[1].bin.7.partial",
    ]
    for name in [*names, f"a[1].bin.{mine}", "a[1].bin.88-aaaaaaaa.partial"]:
        (tmp_path / name).touch()
    whole_file.clear_of(tmp_path / "a[1].bin")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_only_what_was_being_made_is_cleared_from_a_folder(tmp_path):
    names = ["a.partial", "a.b.partial", "imagenet.tar.partial", "a.7.partial", "a.7-b.partial", "7-0123abcd"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.7-0123abcd.partial").mkdir()
    with whole_file.making(tmp_path / "killed.bin") as partial:
        partial.touch()
        whole_file.clear(tmp_path)
        assert not partial.exists()
        partial.touch()  # for the end of the block
    found = sorted(p.name for p in tmp_path.iterdir())
    assert found == sorted([*names, "folder.7-0123abcd.partial", "killed.bin"])


def test_two_machines_may_have_the_same_number_of_a_process(tmp_path):
    """A folder on a network disk, filled by containers whose processes all have the number 1."""
    with whole_file.making(tmp_path / "x") as ours, whole_file.making(tmp_path / "x") as theirs:
        ours.write_text("ours")
        theirs.write_text("theirs")
    assert (tmp_path / "x").read_text() == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
