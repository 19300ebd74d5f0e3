"""Tiny multimodal models, made by transformers itself, and what they are shown: one of each kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import tiny

IMAGE = 95  # the token of the vocabulary that an image takes the place of
TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
_QWEN: dict[str, Any] = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
    "out_hidden_size": 32, "num_position_embeddings": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


def _ids(images: int, each: int) -> torch.Tensor:
    """Two rows of twelve tokens, with `each` places for an image."""
    ids = torch.randint(3, IMAGE, (images, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 2 : 2 + each] = IMAGE
    return ids


def _plain(each: int, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    return {
        "input_ids": _ids(2, each),
        "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
        **more,
    }


def _patches() -> dict[str, Any]:
    """Images as Qwen cuts them: 4 patches each, of which 4 make one token."""
    patches = torch.randn(8, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(2))
    ids = _ids(2, 1)
    return {
        "input_ids": ids,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 2, 2]] * 2),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


@dataclass(frozen=True)
class Kind:
    """A wrapper: its type, its config, and what a forward pass is shown."""

    model_type: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]


KINDS: dict[str, Kind] = {
    "llava": Kind(
        "llava",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **_VISION},
            "image_token_index": IMAGE,
            "image_seq_length": 4,
        },
        lambda: _plain(4),
    ),
    "mistral3": Kind(
        "mistral3",
        {
            "text_config": {"model_type": "mistral", **TEXT},
            "vision_config": {"model_type": "pixtral", "head_dim": 8, **_VISION},
            "image_token_index": IMAGE,
            "tie_word_embeddings": False,
        },
        lambda: _plain(1, image_sizes=torch.tensor([[8, 8]] * 2)),
    ),
    "internvl": Kind(
        "internvl",
        {
            "text_config": {"model_type": "qwen3", **TEXT},
            "vision_config": {
                "model_type": "internvl_vision", **_VISION, "image_size": [8, 8], "patch_size": [4, 4]
            },
            "image_token_id": IMAGE,
            "image_seq_length": 1,
        },
        lambda: _plain(1),
    ),
    "qwen3_vl": Kind(
        "qwen3_vl",
        {
            "text_config": {
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            },
            "vision_config": {**_QWEN, "deepstack_visual_indexes": [0]},
            "image_token_id": IMAGE,
        },
        _patches,
    ),
    "qwen3_5": Kind(
        "qwen3_5",
        {"text_config": {**TEXT, **_LINEAR}, "vision_config": _QWEN, "image_token_id": IMAGE},
        _patches,
    ),
    "gemma3": Kind(
        "gemma3",
        {
            "text_config": {**TEXT, "sliding_window": 8},
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **_VISION},
            "mm_tokens_per_image": 1,
            "image_token_index": IMAGE,
        },
        lambda: _plain(1),
    ),
    "idefics3": Kind(
        "idefics3",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "idefics3_vision", **_VISION},
            "image_token_id": IMAGE,
            "scale_factor": 2,
        },
        lambda: _plain(1) | {"pixel_values": _plain(1)["pixel_values"][:, None]},
    ),
}  # fmt: skip


def built(kind: str, seed: int = 0, **text: Any) -> Any:
    """A wrapper with weights large enough that a missing one shows; `text` changes its text model."""
    found = KINDS[kind]
    changed = {"text_config": {**found.config["text_config"], **text}} if text else {}
    config = transformers.CONFIG_MAPPING[found.model_type](**{**found.config, **changed})
    return tiny.shake(transformers.AutoModelForImageTextToText.from_config(config).float(), seed)


def make(folder: Path, kind: str, seed: int = 0, **text: Any) -> Path:
    """Save such a wrapper."""
    built(kind, seed, **text).save_pretrained(folder)
    return folder


def logits(model: Any, kind: str, **more: Any) -> torch.Tensor:
    """What the model says about images and text."""
    with torch.inference_mode():
        return model.eval()(**{**KINDS[kind].inputs(), **more}).logits
