"""The settings that generation heeds, without those that say what transformers assumes anyway."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

_UNHEEDED = ("transformers_version", "_from_model_config")


def settings(model: PreTrainedModel) -> dict[str, Any]:
    """Return the settings of a model's generation that differ from transformers' own, by name."""
    found = model.generation_config
    usual = GenerationConfig._get_default_generation_params()
    return {
        key: value
        for key, value in ({} if found is None else found.to_diff_dict()).items()
        if key not in _UNHEEDED and value is not None
        # A token may have the number 0, which Python takes for False.
        if (value != usual[key] if key in usual else value is not False)
    }


def give(model: PreTrainedModel, folder: Path, settings: Mapping[str, Any]) -> None:
    """Let a model generate as one that is opened from its folder does.

    `folder` is that of its source, whose generation_config.json a conversion copies. Without such a file, it
    generates by `settings`, if there are any.
    """
    if not model.can_generate():
        return
    if settings:
        model.generation_config = GenerationConfig(**settings)
    with suppress(OSError):  # there is none, or it is damaged; `from_pretrained` goes on without it as well
        model.generation_config = GenerationConfig.from_pretrained(folder)
