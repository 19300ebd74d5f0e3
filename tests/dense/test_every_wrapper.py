"""Every multimodal model that upcycle knows, with experts in each part that can have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

import every_wrapper
import tiny_wrappers
from tiny import ROUTER_STD
from tiny_wrappers import TEXT
from upcycle import Recipe, UpcycleError, blueprint, convert, families
from upcycle.families._wrappers import WRAPPERS
from upcycle.hf.body import Body

# One with each tower that can have experts, one with a class of its own, one with two towers, one that keeps
# counters, one of sound; tests/dense/test_wrappers.py has seven more.
QUICK = {"lighton_ocr", "llava_onevision", "idefics2", "video_llava", "granite_speech", "voxtral"}

_NEVER = "never tried"
_SILENT = "it has no language head"
_HEADED = "its text model has its own head inside"
_UNKNOWN = "its usual text model is of no known family"
_ENCODER = "never tried: its text model is an encoder"
NOT_TAKEN = {
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), _HEADED),
    **dict.fromkeys(("glm46v", "glmga", "kimi_k25", "ultravbert"), _UNKNOWN),
    **dict.fromkeys(("fuyu", "hyperclovax_vision_v2", "lfm3_vl"), _UNKNOWN),
    **dict.fromkeys(("grounding-dino", "mm-grounding-dino", "omdet-turbo", "sam3", "jev"), _SILENT),
    **dict.fromkeys(("pe_audio", "pe_audio_video", "pe_video", "modernvbert"), _ENCODER),
    **dict.fromkeys(("deepseek_vl", "deepseek_vl_hybrid", "janus", "cosmos3_omni", "fun_asr_nano"), _NEVER),
    **dict.fromkeys(("nemo_speechlm", "nemotron_h_omni"), _NEVER),
    "vision-text-dual-encoder": _ENCODER,
    "florence2": "its text model is an encoder and a decoder",
    "paligemma": "it sets a key of its text model that only a gemma has",
    "pp_chart2table": "it is a got_ocr2 under another name, with no class of its own",
    "qianfan_ocr": "transformers saves its text model below encoder.layers, as no other",
    "shieldgemma2": "it says yes or no, with a whole gemma3 inside",
    "vibevoice": "it speaks by diffusion, and the text model's key alone ties its head",
    "voxtral_realtime": "its class has a text model of its own",
}


def test_each_has_a_case():
    assert {*every_wrapper.CASES, *tiny_wrappers.KINDS} == {*WRAPPERS}


def test_none_is_missing():
    """A config of transformers with a text model of a known family, or with any, is taken or has a reason."""
    found = {name for name in CONFIG_MAPPING_NAMES if _holds_a_known_text(name)}
    assert found - {*families.REFUSED} == {*WRAPPERS, *NOT_TAKEN}


def _holds_a_known_text(model_type: str) -> bool:
    folder = model_type_to_module_name(model_type)
    file = Path(transformers.__file__).parent / "models" / folder / f"configuration_{folder}.py"
    if not file.exists() or '"text_config":' not in file.read_text():
        return False  # seen without an import, of which there would be hundreds
    cls = transformers.CONFIG_MAPPING[model_type]
    usual, asked = _text(cls), _text(cls, text_config={"model_type": "llama"})
    return getattr(usual, "model_type", "") in families.names() or isinstance(asked, transformers.LlamaConfig)


def _text(cls: Any, **given: Any) -> Any:
    """The config of the text model within; None if there is none, or the class reads keys that it lacks."""
    try:
        return getattr(cls(**given), "text_config", None)
    except (AttributeError, StrictDataclassError):
        return None


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
    std = ROUTER_STD.get(known.text, 0.5)
    built = convert(
        tmp_path / "dense",
        tmp_path / "moe",
        Recipe.of(moe={**moe, "part": "text+vision" if sees else "text"}, router={"std": std}),
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
