"""A config.json that asks for kernels decides nothing about the code that is fetched and run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import tiny
import tiny_wrappers
import upcycle
from upcycle import Recipe, convert, verify
from upcycle.hf import implementations

RECIPE = Recipe.of(moe={"num_experts": 2, "top_k": 2, "target": "upcycled"})
ASKED = [
    ("attn_implementation", "flash_attention_2"),
    ("_attn_implementation", "kernels-community/flash-attn3"),
    ("attn_implementation", "somebody/kernels"),
    ("attn_implementation", {"": "flash_attention_2"}),
    ("experts_implementation", "deepgemm"),
]


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    """Whoever asks for a kernel fails, whether the package for them is installed or not."""
    from transformers import modeling_utils

    def fail(*args, **kwargs):
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", fail)
    implementations._warn_once.cache_clear()


def asking(folder: Path, out: Path, key: str, value: object, part: str = "") -> Path:
    """A copy of a folder whose config.json asks for an implementation."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (config[part] if part else config)[key] = value
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.usefixtures("on_screen")
@pytest.mark.parametrize(("key", "value"), ASKED)
def test_a_conversion_is_verified_and_opened_all_the_same(key, value, dense, tmp_path, capsys):
    source = asking(dense("llama"), tmp_path / "dense", key, value)
    convert(source, tmp_path / "moe", RECIPE)
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks
    assert f"{key.strip('_')} = " in " ".join(capsys.readouterr().err.split())
    asking(tmp_path / "moe", tmp_path / "asking", key, value)
    ids = torch.arange(6)[None]
    wanted = upcycle.open(dense("llama"))(ids).logits
    for model in (upcycle.load(source, RECIPE), upcycle.open(tmp_path / "asking"), upcycle.open(source)):
        assert model.config._attn_implementation == "sdpa"
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_part_of_a_multimodal_model_asks_in_vain_too(part, tmp_path):
    tiny_wrappers.make(tmp_path / "whole", "llava")
    source = asking(tmp_path / "whole", tmp_path / "dense", "_attn_implementation", "flash_attention_2", part)
    convert(source, tmp_path / "moe", RECIPE)
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks
    model = upcycle.load(source, RECIPE)
    assert getattr(model.config, part)._attn_implementation == "sdpa"


@pytest.mark.parametrize("moe", [True, False])
def test_a_run_trains_and_scores_all_the_same(moe, tmp_path):
    tiny.make_dense(tmp_path / "whole", "llama", vocab_size=259)
    source = asking(tmp_path / "whole", tmp_path / "dense", *ASKED[0])
    tiny.make_bytes_tokenizer(source)
    (tmp_path / "text.txt").write_text("the cat sat on the mat .\n" * 200)
    table = {
        "source": str(source),
        "out": str(tmp_path / "run"),
        "data": {"sources": [{"path": str(tmp_path / "text.txt")}]},
        "train": {"steps": 1, "batch_tokens": 32, "sequence_length": 16},
        "schedule": {"name": "constant", "peak": 1e-3},
    }
    upcycle.train(table | ({"moe": {"num_experts": 2, "top_k": 2, "target": "upcycled"}} if moe else {}))
    upcycle.export(tmp_path / "run", tmp_path / "out")
    asking(tmp_path / "out", tmp_path / "asking", *ASKED[0])
    assert upcycle.evaluate(tmp_path / "asking", text=tmp_path / "text.txt")
    assert upcycle.inspect(tmp_path / "asking").blocks


@pytest.mark.parametrize("asked", ["eager", "sdpa"])
def test_what_transformers_has_itself_is_heeded(asked, dense, tmp_path):
    source = asking(dense("llama"), tmp_path / "dense", "attn_implementation", asked)
    assert upcycle.open(source).config._attn_implementation == asked
    assert upcycle.load(source, RECIPE).config._attn_implementation == asked


def test_what_a_user_asks_for_is_tried(dense, tmp_path):
    source = asking(dense("llama"), tmp_path / "dense", *ASKED[0])
    with pytest.raises(upcycle.UpcycleError, match=r"asked for|FlashAttention"):
        upcycle.open(source, attn_implementation="flash_attention_2")
