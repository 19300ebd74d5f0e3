"""What may be made, written over and deleted: only what this program wrote; one writer at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from upcycle import Recipe, convert
from upcycle.errors import UpcycleError
from upcycle.system import claim, lock
from upcycle.training import export


def test_what_may_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    claim.may_create(tmp_path / "new")
    claim.may_create(tmp_path / "a" / "b" / "new")
    for name, said in (
        ("file", "exists already"),
        ("file/new", "a part of the path is a file"),
        ("nowhere", "a link to gone, which does not exist"),
        ("loop", "leads nowhere"),
        ("loop/new", "leads nowhere"),
        ("a\0b", "leads nowhere"),
    ):
        with pytest.raises(UpcycleError, match=said):
            claim.may_create(tmp_path / name)


def test_nothing_is_made_where_nobody_may_write(tmp_path, monkeypatch):
    """An export asks before it opens its model. Root may write everywhere, so the system's answer is ours."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or Path(path) != tmp_path)
    said = rf"{tmp_path} cannot be written to; check its permissions"
    for path in (tmp_path / "new", tmp_path / "a" / "new"):
        with pytest.raises(UpcycleError, match=said):
            claim.may_create(path)
    monkeypatch.setattr(export, "read_record", lambda folder: None)
    monkeypatch.setattr(export, "_checkpoint", lambda folder, step: folder)
    with pytest.raises(UpcycleError, match=said):
        export.export(tmp_path / "run", tmp_path / "new")


def test_what_may_be_replaced(tmp_path):
    (tmp_path / "ours").write_text("ours")
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "folder").mkdir()

    def ours(path: Path) -> bool:
        return path.read_text() == "ours"

    claim.may_replace(tmp_path / "ours", ours, "a result")
    claim.may_replace(tmp_path / "new", ours, "a result")
    for name in ("theirs", "folder"):
        with pytest.raises(UpcycleError, match="is not a result; nothing is overwritten"):
            claim.may_replace(tmp_path / name, ours, "a result")


def test_a_folder_without_a_marker_is_somebody_elses(tmp_path):
    folder, out = tmp_path / "out.partial", tmp_path / "out"
    folder.mkdir()
    (folder / "notes").write_text("keep")
    (tmp_path / "link").symlink_to(folder)
    for change in (claim.begin, claim.discard, claim.refuse_foreign):
        for path in (folder, tmp_path / "link"):
            with pytest.raises(UpcycleError, match="it was not left by upcycle"):
                change(path)
    assert (folder / "notes").read_text() == "keep"
    (folder / "notes").unlink()
    claim.begin(folder)
    (folder / "half").write_text("x")
    claim.begin(folder)
    assert [p.name for p in folder.iterdir()] == [claim.MARKER]
    claim.finish(folder, out)
    assert not [*out.iterdir()]


HOLDER = """
import sys
from pathlib import Path
from upcycle.system import lock
with lock.held(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_by_one_and_falls_with_its_holder(tmp_path):
    path = tmp_path / "x.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UpcycleError, match="busy"), lock.held(path, "busy"):
        pass
    assert path.exists()
    holder.kill()
    holder.communicate()
    with lock.held(path, "busy"), pytest.raises(UpcycleError), lock.held(path, "busy"):
        pass
    assert not path.exists()


@pytest.mark.parametrize("make", ["file", "link", "folder", "fifo"])
def test_a_lock_takes_no_file_of_somebody_else(make, tmp_path):
    path = tmp_path / "x.lock"
    (tmp_path / "empty").touch()
    match make:
        case "file":
            path.write_text("keep")
        case "link":
            path.symlink_to(tmp_path / "empty")
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
    with pytest.raises(UpcycleError, match="in the way of a lock"), lock.held(path, "busy"):
        pass
    assert os.path.lexists(path)


def test_whoever_loses_the_race_touches_nothing(dense, tmp_path, monkeypatch):
    """Another run holds the lock before this one has made its folder, and that folder is its own."""
    with lock.held(tmp_path / "out.lock", "busy"):
        with pytest.raises(UpcycleError, match="another run is writing"):
            convert(dense("llama"), tmp_path / "out", Recipe.of())
        assert [p.name for p in tmp_path.iterdir()] == ["out.lock"]
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "journal.jsonl").touch()
        with pytest.raises(UpcycleError, match="another run is writing"):
            convert(dense("llama"), tmp_path / "out", Recipe.of(), resume=True)
        assert (tmp_path / "out.partial" / "journal.jsonl").exists()
    convert(dense("llama"), tmp_path / "out", Recipe.of(), resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("target", ["nowhere", "out"])
def test_out_as_a_link_that_leads_nowhere(target, dense, tmp_path):
    """Refused before anything is written."""
    (tmp_path / "out").symlink_to(target)
    with pytest.raises(UpcycleError, match=r"does not exist|leads nowhere"):
        convert(dense("llama"), tmp_path / "out", Recipe.of())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_links_in_it_is_not_written_through(dense, tmp_path):
    (tmp_path / "theirs").write_text("keep")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "journal.jsonl").touch()
    (tmp_path / "out.partial" / "README.md").symlink_to(tmp_path / "theirs")
    with pytest.raises(UpcycleError, match="it was not left by upcycle"):
        convert(dense("llama"), tmp_path / "out", Recipe.of(), resume=True)
    assert (tmp_path / "theirs").read_text() == "keep"
