"""Every multimodal model of upcycle's table at a tiny size: its config, and what a forward pass is shown.

Those that read images get two of them, and those that read sound get two pieces of it. Each stands in a row
with a text, at the places that the model keeps for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import tiny
from tiny_wrappers import _LINEAR, _QWEN, _VISION, IMAGE, TEXT
from upcycle.families._wrappers import WRAPPERS

Shown = dict[str, Any]

_SIGLIP = {"vision_use_head": False, **_VISION}
_SOUND: Shown = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_mel_bins": 8, "max_source_positions": 8,
}  # fmt: skip
_WHISPER: Shown = {
    "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "num_mel_bins": 8, "max_source_positions": 8,
}  # fmt: skip
_WAVES: Shown = {
    "model_type": "vibevoice_acoustic_tokenizer_encoder", "hidden_size": 8, "num_filters": 2,
    "downsampling_ratios": [2, 2], "depths": [1, 1, 1],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A wrapper: the keys of its config besides `text_config`, and what it is shown besides a text."""

    config: Shown
    places: int  # the tokens of a row that an image or a piece of sound takes
    shown: Callable[[], Shown]
    text: Shown  # what its text_config has besides the sizes


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _pixels(*shape: int, **more: Any) -> Callable[[], Shown]:
    return lambda: {"pixel_values": _draw(*(shape or (2, 3, 8, 8))), **more}


def _mel(frames: int, mask: str = "", kind: torch.dtype = torch.long) -> Callable[[], Shown]:
    masked = {mask: torch.ones(2, frames, dtype=kind)} if mask else {}
    return lambda: {"input_features": _draw(2, 8, frames), **masked}


def built(model_type: str, /, **text: Any) -> Any:
    """A wrapper with weights large enough that a missing one shows; `text` has more of its text_config."""
    case, known = CASES[model_type], WRAPPERS[model_type]
    text = {"model_type": known.text, **TEXT, **case.text, **text}
    config = transformers.CONFIG_MAPPING[model_type](**case.config, text_config=text)
    return tiny.shake(getattr(transformers, known.architecture)(config).float(), 0).eval()


def make(folder: Path, model_type: str) -> Any:
    """Save such a wrapper; return the model."""
    model = built(model_type)
    model.save_pretrained(folder)
    return model


def logits(model: Any, model_type: str, sign: int = 1) -> torch.Tensor:
    """What the model says about texts with images or sound in them, which `sign` can turn into others."""
    case = CASES[model_type]
    ids = torch.randint(3, IMAGE - 3, (2, 16), generator=torch.Generator().manual_seed(1))
    ids[:, 2 : 2 + case.places] = IMAGE
    shown = {
        k: v * sign if torch.is_tensor(v) and v.is_floating_point() else v for k, v in case.shown().items()
    }
    with torch.inference_mode():
        return model(input_ids=ids, **shown).logits


def _case(config: Shown, places: int = 1, shown: Callable[[], Shown] | None = None, /, **text: Any) -> Case:
    return Case(config, places, shown or _pixels(), text)


_SIZES = torch.tensor([[8, 8]] * 2)

CASES: dict[str, Case] = {
    "aya_vision": _case(
        {"vision_config": {"model_type": "siglip_vision_model", **_SIGLIP}, "image_token_index": IMAGE}
    ),
    "audioflamingo3": _case(
        {"audio_config": _SOUND, "audio_token_id": IMAGE}, 4, _mel(16, "input_features_mask")
    ),
    "cohere2_vision": _case(
        {
            "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP},
            "image_token_id": IMAGE,
            "alignment_intermediate_size": 16,
        },
    ),
    "exaone4_5": _case(
        {
            "vision_config": {
                **{k: v for k, v in _QWEN.items() if k != "num_position_embeddings"},
                "num_key_value_heads": 1,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "image_token_id": IMAGE,
        },
        1,
        lambda: {"pixel_values": _draw(8, 96), "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)},
    ),
    "fast_vlm": _case(  # its own tower is timm's; one of convolutions has the same outputs
        {
            "vision_config": {
                "model_type": "convnext",
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "num_stages": 2,
                "patch_size": 2,
                "hidden_size": 16,
            },
            "image_token_index": IMAGE,
        },
        4,
    ),
    "glmasr": _case(
        {
            "audio_config": {
                **{k: v for k, v in _SOUND.items() if k != "max_source_positions"},
                "intermediate_size": 64,
            },
            "audio_token_id": IMAGE,
        },
        2,
        _mel(16, "input_features_mask"),
    ),
    "got_ocr2": _case(
        {
            "vision_config": {
                "hidden_size": 16,
                "output_channels": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 4,
                "mlp_dim": 24,
                "window_size": 2,
                "global_attn_indexes": [0],
            },
            "image_token_index": IMAGE,
        },
        4,
        _pixels(2, 3, 32, 32),
    ),
    "granite_speech": _case(
        {
            "encoder_config": {
                "input_dim": 8,
                "num_layers": 2,
                "hidden_dim": 16,
                "feedforward_mult": 2,
                "num_heads": 2,
                "output_dim": 6,
                "context_size": 8,
                "max_pos_emb": 8,
                "conv_kernel_size": 3,
                "dim_head": 8,
            },
            "projector_config": {
                "model_type": "blip_2_qformer",
                "hidden_size": 16,
                "encoder_hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            "audio_token_index": IMAGE,
            "has_lora_adapter": False,
            "downsample_rate": 2,
            "window_size": 4,
        },
        2,
        lambda: {"input_features": _draw(2, 4, 8)},
    ),
    "lfm2_vl": _case(
        {
            "vision_config": {"num_patches": 4, **{k: v for k, v in _SIGLIP.items() if k != "image_size"}},
            "image_token_id": IMAGE,
        },
        1,
        _pixels(
            2, 4, 48, spatial_shapes=torch.tensor([[2, 2]] * 2), pixel_attention_mask=torch.ones(2, 4).long()
        ),
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention"],
    ),
    "idefics2": _case(
        {
            "vision_config": _VISION,
            "image_token_id": IMAGE,
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_n_latents": 2,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
            },
        },
        2,
        _pixels(2, 1, 3, 8, 8),
    ),
    "lighton_ocr": _case(
        {"vision_config": {"model_type": "pixtral", "head_dim": 8, **_VISION}, "image_token_id": IMAGE},
        1,
        _pixels(image_sizes=_SIZES),
    ),
    "llava_next": _case(
        {
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "image_token_index": IMAGE,
            "image_grid_pinpoints": [[8, 8]],
        },
        10,
        _pixels(2, 2, 3, 8, 8, image_sizes=_SIZES),
    ),
    "llava_next_video": _case(
        {
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "image_token_index": IMAGE,
            "image_grid_pinpoints": [[8, 8]],
            "video_token_index": IMAGE - 1,
        },
        10,
        _pixels(2, 2, 3, 8, 8, image_sizes=_SIZES),
    ),
    "llava_onevision": _case(
        {
            "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP},
            "image_token_index": IMAGE,
            "image_grid_pinpoints": [[8, 8]],
            "video_token_index": IMAGE - 1,
        },
        10,
        _pixels(2, 2, 3, 8, 8, image_sizes=_SIZES),
    ),
    "minicpmv4_6": _case(
        {
            "vision_config": {**_VISION, "insert_layer_id": 0},
            "image_token_id": IMAGE,
            "insert_layer_id": 0,
            "image_size": 16,
        },
        1,
        lambda: {"pixel_values": _draw(1, 3, 4, 128), "target_sizes": torch.tensor([[4, 4]] * 2)},
        model_type="qwen3_5_text",
        **_LINEAR,
    ),
    "moss_transcribe_diarize": _case(
        {"audio_config": _SOUND, "audio_token_id": IMAGE, "audio_chunk_size": 16},
        2,
        lambda: {
            **_mel(16, "input_features_mask")(),
            "padding_mask": torch.ones(2, 16, dtype=torch.bool),
        },
    ),
    "musicflamingo": _case(
        {"audio_config": {"model_type": "audioflamingo3_encoder", **_SOUND}, "audio_token_id": IMAGE},
        4,
        _mel(16, "input_features_mask"),
    ),
    "ovis2": _case(
        {
            "vision_config": {
                **_VISION,
                "vocab_size": 20,
                "num_visual_indicator_tokens": 2,
                "hidden_stride": 1,
            },
            "image_token_id": IMAGE,
            "visual_indicator_token_ids": [93, 94],
            "vocab_size": 96,
            "hidden_size": 32,
        },
        4,
    ),
    "perception_lm": _case(  # its own tower is timm's; CLIP's has the same outputs
        {
            "vision_config": {"model_type": "clip_vision_model", "model_args": {"embed_dim": 16}, **_VISION},
            "image_token_id": IMAGE,
            "video_token_id": IMAGE - 1,
        },
        4,
        _pixels(2, 1, 3, 8, 8),
    ),
    "qwen2_audio": _case(
        {"audio_config": _WHISPER, "audio_token_index": IMAGE},
        4,
        _mel(16, "feature_attention_mask"),
    ),
    "qwen3_asr": _case(
        {
            "audio_config": {
                **{k: v for k, v in _WHISPER.items() if k != "max_source_positions"},
                "output_dim": 32,
                "n_window": 50,
                "n_window_infer": 100,
                "downsample_hidden_size": 8,
                "max_position_embeddings": 13,
            },
            "audio_token_id": IMAGE,
            "pad_token_id": 0,
        },
        13,
        _mel(100, "input_features_mask"),
    ),
    "smolvlm": _case(
        {"vision_config": _VISION, "image_token_id": IMAGE, "scale_factor": 2}, 1, _pixels(2, 1, 3, 8, 8)
    ),
    "vibevoice_asr": _case(
        {
            "acoustic_tokenizer_encoder_config": _WAVES,
            "semantic_tokenizer_encoder_config": _WAVES,
            "audio_token_id": IMAGE,
            "acoustic_tokenizer_chunk_size": 16,
        },
        2,
        lambda: {
            "input_values": _draw(2, 1, 8),
            "padding_mask": torch.ones(2, 8, dtype=torch.bool),
            "sample": False,
        },
    ),
    "video_llama_3": _case(
        {"vision_config": {k: v for k, v in _VISION.items() if k != "image_size"}, "image_token_id": IMAGE},
        4,
        lambda: {
            "pixel_values": _draw(8, 48),
            "image_grid_thw": torch.tensor([[1, 2, 2]] * 2),
            "image_merge_sizes": torch.tensor([1, 1]),
        },
    ),
    "video_llava": _case(
        {
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "image_token_index": IMAGE,
            "video_token_index": IMAGE - 1,
        },
        4,
        lambda: {"pixel_values_images": _draw(2, 3, 8, 8)},
    ),
    "vipllava": _case(
        {
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "image_token_index": IMAGE,
            "vision_feature_layers": [-1, -2],
        },
        4,
    ),
    "voxtral": _case(
        {"audio_config": {**_SOUND, "intermediate_size": 64}, "audio_token_id": IMAGE}, 2, _mel(16)
    ),
}

# Those of one make, which are shown the same.
CASES["granite_speech_plus"] = CASES["granite_speech"]
_SLICED = CASES["minicpmv4_6"]
CASES["minicpm_ocr"] = replace(_SLICED, config={**_SLICED.config, "downsample_mode": "16x"})
CASES["minicpmv4_7"] = replace(  # it counts positions from marks around each image, and here it is told them
    _SLICED, shown=lambda: {**_SLICED.shown(), "position_ids": torch.arange(16).expand(2, 16)}
)
