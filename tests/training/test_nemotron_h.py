"""Nemotron-H, whose dense class and native Mixture of Experts are one class, is trained and exported."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

import tiny
import upcycle
from upcycle.dense.subject import Subject
from upcycle.training.export import export


@pytest.mark.parametrize("target", ["native", "upcycled"])
def test_a_run_ends_in_the_names_that_convert_writes(target, tmp_path):
    source = tiny.make_dense(tmp_path / "dense", "nemotron_h", vocab_size=300)
    tiny.make_bytes_tokenizer(source)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    moe = {"num_experts": 2, "top_k": 1, "target": target}
    run = {
        "source": str(source),
        "out": str(tmp_path / "run"),
        "moe": moe,
        "data": {"sources": [{"path": str(tmp_path / "text.txt")}]},
        "train": {"steps": 1, "batch_tokens": 32, "sequence_length": 16},
        "schedule": {"name": "constant", "peak": 1e-3},
        "checkpoint": {"every": 1},
    }
    assert upcycle.train(run).finished
    export(tmp_path / "run", tmp_path / "trained")
    upcycle.convert(source, tmp_path / "made", {"moe": moe})
    made, trained = (load_file(tmp_path / name / "model.safetensors") for name in ("made", "trained"))
    assert made.keys() == trained.keys()
    assert len(upcycle.inspect(tmp_path / "trained").blocks) == 2
    assert "linear_attention" in (Subject.of(tmp_path / "trained").tells_apart(16) or "")
