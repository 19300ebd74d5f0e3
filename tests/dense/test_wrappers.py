"""A text model within a multimodal one: the same wrapper around experts, and the same answers on images."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny_wrappers
import upcycle
from upcycle import Recipe, UpcycleError, blueprint, convert, verify
from upcycle.checkpoints.checkpoint import Checkpoint

# The wrapper, the target, and the text model that its result holds.
CASES = {
    "llava": ("native", "MixtralModel"),
    "mistral3": ("native", "MixtralModel"),
    "internvl": ("native", "Qwen3MoeModel"),
    "qwen3_vl": ("native", "Qwen3VLMoeTextModel"),
    "qwen3_5": ("native", "Qwen3_5MoeTextModel"),
    "idefics3": ("native", "MixtralModel"),
    "gemma3": ("upcycled", "UpcycledGemma3TextModel"),
    "llava, upcycled": ("upcycled", "UpcycledLlamaModel"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that gives the dense folder of a kind."""
    folders = {}

    def make(kind):
        if kind not in folders:
            folders[kind] = tiny_wrappers.make(tmp_path_factory.mktemp("dense") / kind, kind)
        return folders[kind]

    return make


def opened(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def edit(folder, out, tensors=None, **changes):
    """A copy of a folder with other tensors or other keys of config.json."""
    out.mkdir()
    config = json.loads((folder / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors or load_file(folder / "model.safetensors"), out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("case", CASES)
def test_images_and_text_get_the_same_answers(case, made, tmp_path):
    kind, (target, text_model) = case.partition(",")[0], CASES[case]
    source = made(kind)
    recipe = Recipe.of(moe={"num_experts": 4, "target": target}, router={"std": 0.5})
    built = convert(source, tmp_path / "moe", recipe)
    assert built.preserves_function
    wanted = tiny_wrappers.logits(opened(source), kind)
    model = opened(tmp_path / "moe")
    assert text_model in {type(module).__name__ for module in model.modules()}
    found = tiny_wrappers.logits(model, kind)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
    # Images count, and so do experts.
    images = tiny_wrappers.KINDS[kind].inputs()["pixel_values"]
    other = tiny_wrappers.logits(model, kind, pixel_values=-images)
    assert float((other - wanted).abs().max()) > 1e-3
    # Saved and opened again, and built in memory.
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(tiny_wrappers.logits(opened(tmp_path / "again"), kind), found)
    loaded = upcycle.load(source, recipe)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    proof = verify(source, tmp_path / "moe")
    assert proof.holds, proof.checks
    assert len(upcycle.inspect(tmp_path / "moe").blocks) == 2


def test_what_is_around_the_text_model_stays_as_it_is(made, tmp_path):
    convert(made("llava"), tmp_path / "moe", Recipe.of(moe={"num_experts": 2}))
    with Checkpoint.open(made("llava")) as before, Checkpoint.open(tmp_path / "moe") as after:
        around = [name for name in before.tensors if not name.startswith("language_model.")]
        assert any("vision_tower" in name for name in around)
        assert any("projector" in name for name in around)
        for name in around:
            old, new = before.tensors[name], after.tensors[name]
            assert (before.pread(old, 0, old.nbytes) == after.pread(new, 0, new.nbytes)).all()
        changed = {k for k in before.config if before.config[k] != after.config.get(k)}
        assert changed == {"text_config", "transformers_version"} & changed


def test_a_native_that_the_wrapper_cannot_hold_is_refused(made, monkeypatch):
    from upcycle.families._wrappers import WRAPPERS, Wrapper

    closed = Wrapper(architecture="LlavaForConditionalGeneration", tied=False, free=False)
    monkeypatch.setattr("upcycle.dense.source.WRAPPERS", {**WRAPPERS, "llava": closed})
    with pytest.raises(UpcycleError, match=r"llava of transformers cannot hold a mixtral.*part_only"):
        blueprint(made("llava"), Recipe.of())
