"""Signals that arrive while data is prepared."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import tiny
import upcycle
from heard import Counted
from upcycle import cli
from upcycle.calibration.calibration import ToCalibrate, calibrate
from upcycle.system.signals import interrupting, noted
from upcycle.training.run_folder import MARKER


def told(number: int) -> Counted:
    """A listener that sends this signal as soon as data is read."""
    return Counted("", lambda n: os.kill(os.getpid(), number))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.make_dense(tmp_path_factory.mktemp("signals") / "dense", "llama", vocab_size=300)
    tiny.make_bytes_tokenizer(made)
    (made.parent / "text.txt").write_text("One day a small cat saw a big red ball and ran to it. " * 99)
    return made


def test_a_signal_does_what_ctrl_c_does_until_it_is_noted():
    came = []

    def keyboard(number, frame):
        came.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, keyboard), signal.getsignal(signal.SIGTERM)
    try:
        with interrupting(signal.SIGTERM):
            with noted(signal.SIGTERM) as seen:
                os.kill(os.getpid(), signal.SIGTERM)
            assert (came, seen) == ([], [signal.SIGTERM])
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGINT]
        assert signal.getsignal(signal.SIGTERM) is before[1]
    finally:
        signal.signal(signal.SIGINT, before[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_training_ends_while_it_tokenises(number, dense, tmp_path):
    table = {
        "source": str(dense), "out": str(tmp_path / "run"),
        "data": {"sources": [{"path": str(dense.parent / "text.txt")}]},
        "train": {"steps": 1, "batch_tokens": 32, "sequence_length": 16, "eval_every": 0},
        "schedule": {"name": "constant", "peak": 1e-3},
    }  # fmt: skip
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind a shell's `&`
    try:
        with pytest.raises(KeyboardInterrupt):
            upcycle.train(table, progress=told(number))
    finally:
        signal.signal(signal.SIGINT, before)
    assert [p.name for p in (tmp_path / "run").rglob("*") if p.is_file()] == [MARKER]
    assert upcycle.train(table, resume=True).finished


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_calibrating_ends_while_it_tokenises(number, dense, tmp_path):
    asked = ToCalibrate(text=dense.parent / "text.txt", length=16, limit=2, cache=tmp_path / "cache")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            calibrate(dense, tmp_path / "out.safetensors", asked, progress=told(number))
    finally:
        signal.signal(signal.SIGINT, before)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_scoring_a_text_ends_with_130_and_writes_nothing(number, dense, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("upcycle.cli.program.Bars", lambda: told(number))
    out = tmp_path / "eval.json"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as end:
            cli.main(["eval", str(dense), "--text", str(dense.parent / "text.txt"), "--out", str(out)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert not out.exists()
    assert not (dense / "eval.json").exists()
