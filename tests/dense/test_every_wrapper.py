"""Every multimodal model that upcycle knows, with experts in each part that can have them."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

import every_wrapper
import tiny_wrappers
from tiny_wrappers import TEXT
from upcycle import Recipe, UpcycleError, blueprint, convert, families
from upcycle.families._wrappers import WRAPPERS
from upcycle.hf.body import Body

# One with each tower that can have experts, one with a class of its own, one with two towers, one that keeps
# counters, one of sound; tests/dense/test_wrappers.py has seven more.
QUICK = {"lighton_ocr", "llava_onevision", "idefics2", "video_llava", "granite_speech", "voxtral"}


def test_none_is_missing():
    assert {*every_wrapper.CASES, *tiny_wrappers.KINDS} == {*WRAPPERS}


@pytest.mark.parametrize(
    "model_type",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in every_wrapper.CASES],
)
def test_images_sound_and_text_get_the_same_answers(model_type, tmp_path):
    dense = every_wrapper.make(tmp_path / "dense", model_type)
    known = WRAPPERS[model_type]
    tower = getattr(dense.config, "vision_config", None)
    sees = (
        bool(known.vision) and tower.model_type in families.names() and families.find(tower.model_type).sees
    )
    sees = sees and model_type != "video_llava"  # two towers of one config
    native = bool(families.find(known.text).natives)
    moe = {"num_experts": 3, "target": "native" if native else "upcycled"}
    built = convert(
        tmp_path / "dense",
        tmp_path / "moe",
        Recipe.of(moe={**moe, "part": "text+vision" if sees else "text"}, router={"std": 0.5}),
    )
    assert built.preserves_function
    opened = getattr(transformers, known.architecture).from_pretrained(tmp_path / "moe", dtype=torch.float32)
    names = {type(module).__name__ for module in opened.modules()}
    assert any("Moe" in name or "Mixtral" in name or name == "UpcycledExaone4Model" for name in names)
    assert sees == ("MoE" in names and native)
    assert all(len(Body.of(model).blocks("layers")) == TEXT["num_hidden_layers"] for model in (dense, opened))
    assert Body.of(opened).prefix in {"model.language_model.", "model.text_model."}
    wanted, found = (every_wrapper.logits(model.eval(), model_type) for model in (dense, opened))
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert float((every_wrapper.logits(opened, model_type, -1) - wanted).abs().max()) > 1e-3
    # What is in both files is the same, to the bit.
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "moe"))
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
    if not sees:
        with pytest.raises(UpcycleError, match=r"vision tower|vision_config = None"):
            blueprint(tmp_path / "dense", Recipe.of(moe={"part": "vision"}))
