"""Settings of generation that an old config.json holds are in the result, as transformers reads them."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

import tiny_wrappers
import upcycle
from upcycle import Recipe, convert, verify
from upcycle.conversion import generation_settings
from upcycle.hf import generation

OLD = {"temperature": 0.7, "max_length": 33, "num_beams": 3, "do_sample": True, "top_p": 0.9}
MOE = {"num_experts": 2, "top_k": 1}


def test_the_names_and_what_is_assumed_are_those_of_transformers():
    usual = GenerationConfig._get_default_generation_params()
    assert {key: value for key, value in usual.items() if key != "use_cache"} == generation_settings.USUAL


@pytest.fixture
def old(dense, tmp_path):
    """A source with settings in its config.json, and no generation_config.json."""
    source = shutil.copytree(dense("llama"), tmp_path / "old")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | OLD))
    (source / "generation_config.json").unlink(missing_ok=True)
    return source


@pytest.mark.parametrize("target", ["native", "upcycled"])
def test_they_are_heeded(target, old, tmp_path):
    convert(old, tmp_path / "moe", Recipe.of(moe={**MOE, "target": target}))
    proof = verify(old, tmp_path / "moe")
    assert proof.holds, proof.checks
    found, due = (
        AutoModelForCausalLM.from_pretrained(each).generation_config for each in (tmp_path / "moe", old)
    )
    assert {key: getattr(found, key) for key in OLD} == {key: getattr(due, key) for key in OLD} == OLD
    assert (tmp_path / "moe" / generation_settings.FILE).exists() == (target == "native")


@pytest.mark.parametrize("file", [None, {"eos_token_id": [2, 50], "max_new_tokens": 30}])
@pytest.mark.parametrize("target", ["native", "upcycled"])
def test_a_model_that_is_made_in_memory_heeds_the_same(target, file, old, tmp_path):
    if file is not None:
        (old / generation_settings.FILE).write_text(json.dumps(file))
    recipe = Recipe.of(moe={**MOE, "target": target})
    convert(old, tmp_path / "moe", recipe)
    found, due = upcycle.load(old, recipe), upcycle.open(tmp_path / "moe")
    for key, value in (OLD if file is None else file).items():
        assert getattr(found.generation_config, key) == getattr(due.generation_config, key) == value


def test_a_file_of_the_source_goes_before_them(old, tmp_path):
    (old / generation_settings.FILE).write_text(json.dumps({"temperature": 0.3, "do_sample": True}))
    convert(old, tmp_path / "moe", Recipe.of(moe=MOE))
    assert json.loads((tmp_path / "moe" / generation_settings.FILE).read_text())["temperature"] == 0.3
    assert verify(old, tmp_path / "moe").holds


@pytest.mark.parametrize("where", ["text", "outer"])
@pytest.mark.parametrize(
    "moe", [{"target": "mixtral"}, {"target": "upcycled"}, {"part_only": "text"}], ids=str
)
def test_those_of_a_multimodal_model_are_heeded(where, moe, tmp_path):
    """transformers takes those of the text model where the outer config has none."""
    source = tmp_path / "old"
    tiny_wrappers.make(source, "llava")
    (source / generation_settings.FILE).unlink(missing_ok=True)
    config = json.loads((source / "config.json").read_text())
    place = config if where == "outer" else config["text_config"]
    place |= OLD | {"eos_token_id": [2, 5]}
    (source / "config.json").write_text(json.dumps(config))
    recipe = Recipe.of(moe={**MOE, "top_k": 2, **moe})
    convert(source, tmp_path / "moe", recipe)
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks
    in_memory, on_disk, due = (
        generation.settings(model)
        for model in (upcycle.load(source, recipe), upcycle.open(tmp_path / "moe"), upcycle.open(source))
    )
    assert in_memory == on_disk == due
    assert due["eos_token_id"] == [2, 5]
    assert due.items() >= OLD.items()
