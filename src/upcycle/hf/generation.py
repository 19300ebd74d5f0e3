"""The settings that generation heeds, without those that say what transformers assumes anyway."""

from __future__ import annotations

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
