"""Multimodal models of transformers around a text model: what upcycle knows about each, as one table.

A wrapper keeps the config of its text model in `text_config`. Most build the text model that this config
names, whatever it is, so the same wrapper holds the Mixture of Experts. A few have a second class for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """One wrapper class of transformers. A test compares each with the installed version."""

    architecture: str  # the class with a language head
    text: str = "llama"  # the text model of a text_config that names none
    tied: bool = True  # what the wrapper assumes if config.json does not say whether the head is tied
    # when the text model's own key ties a head that is not stored, whatever the outer one says, or if the
    # outer one is absent
    tied_by_text: Literal["never", "if outer is absent", "always"] = "never"
    free: bool = True  # it builds the text model that text_config names
    # the vision tower of a vision_config that names none, if it builds the one that is named there; empty if
    # it has a class of its own for that, or sees nothing
    vision: str = ""
    # its second class, by the model_type of the MoE text model: model_type and architecture
    twins: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def _twin(native: str, model_type: str, architecture: str) -> Mapping[str, tuple[str, str]]:
    return {native: (model_type, architecture)}


TEXT: Final = "text"  # the parts of a wrapper that can have experts
VISION: Final = "vision"

# The classes whose plan for FSDP names the head. All others gather it with the whole model.
HEAD_APART = frozenset({"Qwen3_5MoeForConditionalGeneration"})


def config_key(part: str) -> str:
    """Return the key of config.json that holds the config of a part."""
    return f"{part}_config"


WRAPPERS: Mapping[str, Wrapper] = {
    "aya_vision": Wrapper(
        architecture="AyaVisionForConditionalGeneration", vision="siglip_vision_model", text="cohere2"
    ),
    "audioflamingo3": Wrapper(architecture="AudioFlamingo3ForConditionalGeneration", text="qwen2"),
    "cohere2_vision": Wrapper(
        architecture="Cohere2VisionForConditionalGeneration", vision="siglip_vision_model", text="cohere2"
    ),
    "exaone4_5": Wrapper(architecture="Exaone4_5_ForConditionalGeneration", text="exaone4", tied=False),
    "fast_vlm": Wrapper(
        architecture="FastVlmForConditionalGeneration",
        vision="timm_wrapper",
        text="qwen2",
        tied=False,
        tied_by_text="always",
    ),
    "gemma3": Wrapper(
        architecture="Gemma3ForConditionalGeneration",
        vision="siglip_vision_model",
        text="gemma3_text",
        free=False,
    ),
    "glmasr": Wrapper(architecture="GlmAsrForConditionalGeneration"),
    "got_ocr2": Wrapper(architecture="GotOcr2ForConditionalGeneration", text="qwen2"),
    "granite_speech": Wrapper(architecture="GraniteSpeechForConditionalGeneration", text="granite"),
    "granite_speech_plus": Wrapper(architecture="GraniteSpeechPlusForConditionalGeneration", text="granite"),
    "idefics2": Wrapper(architecture="Idefics2ForConditionalGeneration", text="mistral", tied=False),
    "idefics3": Wrapper(architecture="Idefics3ForConditionalGeneration", tied=False),
    "internvl": Wrapper(architecture="InternVLForConditionalGeneration", text="qwen2"),
    "lfm2_vl": Wrapper(
        architecture="Lfm2VlForConditionalGeneration", vision="siglip2_vision_model", text="lfm2"
    ),
    "lighton_ocr": Wrapper(architecture="LightOnOcrForConditionalGeneration", vision="pixtral", text="qwen3"),
    "llava": Wrapper(
        architecture="LlavaForConditionalGeneration",
        vision="clip_vision_model",
        tied=False,
        tied_by_text="always",
    ),
    "llava_next": Wrapper(
        architecture="LlavaNextForConditionalGeneration", vision="clip_vision_model", tied=False
    ),
    "llava_next_video": Wrapper(
        architecture="LlavaNextVideoForConditionalGeneration",
        vision="clip_vision_model",
        tied=False,
        tied_by_text="always",
    ),
    "llava_onevision": Wrapper(
        architecture="LlavaOnevisionForConditionalGeneration",
        vision="siglip_vision_model",
        text="qwen2",
        tied=False,
        tied_by_text="always",
    ),
    "minicpm_ocr": Wrapper(architecture="MiniCPMOcrForConditionalGeneration", text="qwen3_5_text"),
    "minicpmv4_6": Wrapper(
        architecture="MiniCPMV4_6ForConditionalGeneration", text="qwen3_5_text", tied=False
    ),
    "minicpmv4_7": Wrapper(
        architecture="MiniCPMV4_7ForConditionalGeneration", text="qwen3_5_text", tied=False
    ),
    "mistral3": Wrapper(architecture="Mistral3ForConditionalGeneration", vision="pixtral", text="mistral"),
    "moss_transcribe_diarize": Wrapper(
        architecture="MossTranscribeDiarizeForConditionalGeneration", text="qwen3"
    ),
    "musicflamingo": Wrapper(architecture="MusicFlamingoForConditionalGeneration", text="qwen2"),
    "ovis2": Wrapper(architecture="Ovis2ForConditionalGeneration", text="qwen2"),
    "perception_lm": Wrapper(
        architecture="PerceptionLMForConditionalGeneration",
        vision="timm_wrapper",
        tied=False,
        tied_by_text="if outer is absent",
    ),
    "qwen2_audio": Wrapper(architecture="Qwen2AudioForConditionalGeneration", text="qwen2"),
    "qwen3_5": Wrapper(
        architecture="Qwen3_5ForConditionalGeneration",
        text="qwen3_5_text",
        tied=False,
        free=False,
        twins=_twin("qwen3_5_moe_text", "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
    ),
    "qwen3_asr": Wrapper(architecture="Qwen3ASRForConditionalGeneration", text="qwen3"),
    "qwen3_vl": Wrapper(
        architecture="Qwen3VLForConditionalGeneration",
        text="qwen3_vl_text",
        tied=False,
        free=False,
        twins=_twin("qwen3_vl_moe_text", "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
    ),
    "smolvlm": Wrapper(architecture="SmolVLMForConditionalGeneration", tied=False),
    "vibevoice_asr": Wrapper(architecture="VibeVoiceAsrForConditionalGeneration", text="qwen2"),
    "video_llama_3": Wrapper(
        architecture="VideoLlama3ForConditionalGeneration", text="qwen2", tied=False, tied_by_text="always"
    ),
    "video_llava": Wrapper(
        architecture="VideoLlavaForConditionalGeneration", vision="clip_vision_model", tied=False
    ),
    "vipllava": Wrapper(
        architecture="VipLlavaForConditionalGeneration", vision="clip_vision_model", tied=False
    ),
    "voxtral": Wrapper(architecture="VoxtralForConditionalGeneration"),
}
