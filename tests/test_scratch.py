"""Temporary folders go with their process."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

from upcycle import scratch


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
