"""What a process takes of a machine: temporary folders, memory."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

from upcycle.system import memory, scratch


def test_what_a_kill_left_goes_and_what_is_held_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "other").mkdir()
    started, told = os.pipe()
    child = os.fork()
    if not child:  # it is killed while it has a folder
        with scratch.folder() as mine:
            (mine / "data").write_bytes(b"half")
            os.write(told, b"x")
            signal.pause()
        os._exit(0)
    os.read(started, 1)
    (left,) = tmp_path.glob("upcycle-scratch-*")
    with scratch.folder() as second:
        assert left.exists()  # its process is alive
        os.kill(child, 9)
        os.waitpid(child, 0)
        with scratch.folder() as third:
            assert not left.exists()
            assert second.exists()
            assert third.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


def test_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    machine = memory.available()
    assert machine is not None
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() is not None
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 3000\n")
    assert memory.available() == 4000
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("900")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("800")
    (tmp_path / "memory" / "memory.stat").write_text("cache 1\ntotal_cache 100\n")
    assert memory.available() == 200
