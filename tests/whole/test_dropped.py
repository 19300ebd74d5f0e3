"""Every command takes a source with tensors that its class does not have, if they are dropped by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import upcycle
from upcycle import Recipe, UpcycleError
from upcycle.api.training import refuse_what_cannot_begin
from upcycle.checkpoints.hub import open_checkpoint
from upcycle.training import teacher
from upcycle.training.run import Run
from upcycle.training.start import start_of

DROP = ["v_head.*", "d2t"]


@pytest.fixture
def beside(trainable, tmp_path) -> Path:
    """A copy of the checkpoint that has a value head and a buffer of whole numbers besides."""
    folder = Path(shutil.copytree(trainable[0], tmp_path / "beside"))
    stored = load_file(folder / "model.safetensors")
    more = {"v_head.summary.weight": torch.ones(1, 64), "d2t": torch.zeros(3, dtype=torch.int64)}
    save_file(stored | more, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def run(trainable, beside, tmp_path):
    """A function that makes a run file of the copy, with changes."""

    def make(**changes: object) -> Run:
        table = {
            "source": str(beside), "out": str(tmp_path / "run"), "drop": DROP,
            "data": {"sources": [{"path": str(trainable[1])}]},
            "train": {"steps": 1, "batch_tokens": 64, "sequence_length": 64},
            "schedule": {"name": "constant", "peak": 1e-3},
        }  # fmt: skip
        return Run.of(table | changes)

    return make


def test_a_dense_run_starts_from_the_same_bits(trainable, run):
    found = start_of(run()).entries
    due = start_of(run(source=str(trainable[0]), drop=[])).entries
    assert list(found) == list(due)
    assert all(np.array_equal(found[n].lazy.all("F32"), due[n].lazy.all("F32")) for n in due)
    refuse_what_cannot_begin(run())
    with pytest.raises(UpcycleError, match=r"holds d2t as I64"):
        start_of(run(drop=DROP[:1]))
    with pytest.raises(UpcycleError, match=r"leave these tensors out \(drop, or --drop NAME\)"):
        start_of(run(drop=DROP[1:]))
    assert "drop" not in run(source=str(trainable[0]), drop=[]).as_table()


def test_a_teacher_has_a_key_of_its_own(trainable, beside, run):
    taught = {"source": str(trainable[0]), "drop": []}
    with pytest.raises(UpcycleError, match=r"leave these tensors out \(teacher\.drop\)"):
        teacher.admitted(run(teacher={"source": str(beside), "drop": ["d2t"]}, **taught), open_checkpoint)
    asked = run(teacher={"source": str(beside), "drop": DROP}, **taught)
    found = teacher.admitted(asked, open_checkpoint)
    assert found is not None
    assert set(found.left_out) == {"v_head.summary.weight", "d2t"}
    assert Run.of(asked.as_table()) == asked
    assert "drop" not in run(teacher={"source": str(beside)}, **taught).as_table()["teacher"]


def test_calibration(trainable, beside, tmp_path):
    """Its statistics are those of the plain checkpoint, and are for a recipe that drops the same."""
    asked = {"text": trainable[1], "limit": 4, "length": 16, "device": "cpu", "collect": ["l1"]}
    found = upcycle.calibrate(beside, tmp_path / "found.safetensors", drop=DROP, **asked)
    due = upcycle.calibrate(trainable[0], tmp_path / "due.safetensors", **asked)
    assert found.tensors.keys() == due.tensors.keys()
    there, here = (load_file(tmp_path / f"{name}.safetensors") for name in ("found", "due"))
    assert all(torch.equal(there[name], here[name]) for name in here)
    importance = {"name": "importance", "statistic": "l1", "statistics": str(tmp_path / "found.safetensors")}
    moe = {"num_experts": 2, "target": "upcycled", "expert_width": 64}
    upcycle.plan(beside, Recipe.of(moe=moe, init=importance, drop=DROP))


def test_rows_of_mergekit(trainable, beside, tmp_path):
    """They are read from a copy in bfloat16, which is opened without what is dropped too."""
    prompts = tmp_path / "prompts.toml"
    prompts.write_text("".join(f'[[domain]]\nname = "{n}"\npositive_prompts = ["{n}"]\n' for n in ("a", "b")))
    asked = {"prompts": prompts, "length": 16, "device": "cpu", "collect": ["mergekit_hidden"]}
    upcycle.calibrate(beside, tmp_path / "found.safetensors", drop=DROP, **asked)
    upcycle.calibrate(trainable[0], tmp_path / "due.safetensors", **asked)
    there, here = (load_file(tmp_path / f"{name}.safetensors") for name in ("found", "due"))
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_inspection(trainable, beside, tmp_path):
    """What the recipe dropped is left out of its source, and `drop` is for what no record says."""
    with pytest.raises(UpcycleError, match="--drop NAME"):
        upcycle.inspect(beside, drop=["d2t"])
    assert len(upcycle.inspect(beside, drop=DROP).blocks) == 5
    upcycle.convert(beside, tmp_path / "moe", Recipe.of(moe={"num_experts": 2}, drop=DROP))
    other = f"compared with {trainable[0]}, whose files are not those that it was made from"
    for source, notes in ((None, ()), (beside, ()), (trainable[0], (other,))):
        found = upcycle.inspect(tmp_path / "moe", source)
        assert found.notes == notes
        assert found.blocks[0].to_dense == pytest.approx((1, 1))
    (tmp_path / "moe" / "upcycle.json").unlink()
    assert upcycle.inspect(tmp_path / "moe", beside, drop=DROP).blocks[0].to_dense == pytest.approx((1, 1))
    with pytest.raises(
        UpcycleError, match="--drop is for the dense model to compare with, and no provenance"
    ):
        upcycle.inspect(tmp_path / "moe", drop=DROP)


def test_evaluation(trainable, beside, tmp_path):
    asked = {"text": trainable[1], "limit": 2, "length": 64}
    with pytest.raises(UpcycleError, match=r"holds d2t"):
        upcycle.evaluate(beside, **asked)
    with pytest.raises(UpcycleError, match="--drop x_head"):
        upcycle.evaluate(beside, drop=[*DROP, "x_head"], **asked)
    found, due = upcycle.evaluate([beside, trainable[0]], drop=DROP, **asked).scored
    assert found.as_json()["loss"] == due.as_json()["loss"]


def test_the_head_that_is_dropped_is_not_scored(trainable, tmp_path):
    """transformers reads a stored head although the config ties it; the embedding takes its place."""
    tied = Path(shutil.copytree(trainable[0], tmp_path / "tied"))
    config = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tied / "config.json").write_text(json.dumps(config))
    stored = load_file(tied / "model.safetensors")
    stored.pop("lm_head.weight", None)
    save_file(stored, tied / "model.safetensors", {"format": "pt"})
    folder = Path(shutil.copytree(tied, tmp_path / "two"))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 1
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    asked = {"text": trainable[1], "limit": 2, "length": 64}
    due, read = upcycle.evaluate([tied, folder], **asked).scored
    (found,) = upcycle.evaluate(folder, drop=["lm_head.weight"], **asked).scored
    assert read.as_json()["loss"] != due.as_json()["loss"]
    assert found.as_json()["loss"] == due.as_json()["loss"]
