"""Tasks that a model is scored on in training: the numbers of `upcycle eval`, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import upcycle
from upcycle import UpcycleError
from upcycle.training import loop
from upcycle.training.metrics import read
from upcycle.training.run import Run

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'upcycle[eval]'")


def test_tasks_are_scored_during_training(trainable, tmp_path):
    source, text = trainable
    rows = [{"text": f"Once upon a time there were {n} cats who liked to"} for n in range(6)]
    (tmp_path / "lambada_openai.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {"tasks": ["lambada_openai"], "task_files": str(tmp_path), "batch_size": 2}
    table = {
        "source": str(source),
        "out": str(tmp_path / "run"),
        "moe": {"num_experts": 4},
        "data": {"sources": [{"path": str(text), "separator": "<|endoftext|>"}]},
        "train": {"steps": 3, "batch_tokens": 128, "sequence_length": 64, "eval_every": 0},
        "schedule": {"name": "constant", "peak": 1e-3},
        "eval": {**tasks, "every": 2},
    }
    upcycle.train(table)
    lines = read(tmp_path / "run")
    assert [line.scores is not None for line in lines] == [False, True, True]
    upcycle.export(tmp_path / "run", tmp_path / "out")
    found = upcycle.evaluate(tmp_path / "out", **tasks).scored[0].results[0]
    wanted = {f"lambada_openai/{name}": metric.value for name, metric in found.metrics.items()}
    assert dict(lines[2].scores) == pytest.approx(wanted, rel=1e-5)
    assert lines[1].scores != lines[2].scores
    upcycle.train({**table, "out": str(tmp_path / "without"), "eval": {}})
    assert [line.loss for line in read(tmp_path / "without")] == [line.loss for line in lines]
    with pytest.raises(UpcycleError, match=r"take one of them"):
        loop.train(Run.of({**table, "out": str(tmp_path / "third")}))
    bad = {**table, "eval": {**tasks, "tasks": ["piqa"]}, "out": str(tmp_path / "fourth")}
    with pytest.raises(UpcycleError, match="piqa"):
        upcycle.train(bad)
    assert not Path(bad["out"]).exists()
