"""Settings of generation that an old config.json holds, as a generation_config.json of the result.

transformers once kept `temperature`, `max_length` and the like in config.json, and still heeds them there if
a folder has no generation_config.json. A config that is written in another architecture's terms does not have
them, so they get the file that they have today.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle.blueprints.blueprint import Blueprint
from upcycle.system import whole_file

FILE = "generation_config.json"

# What transformers takes out of config.json, and what it assumes (a test compares them).
USUAL: Mapping[str, Any] = {
    "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1,
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0,
    "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None, "num_return_sequences": 1, "output_scores": False,
    "return_dict_in_generate": False, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "remove_invalid_values": False, "exponential_decay_length_penalty": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0, "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10, "target_lookbehind": 10, "num_beam_groups": 1, "diversity_penalty": 0.0,
}  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_PARTS = ("decoder", "generator", "text_config")  # where else transformers looks, the first that is there


def of(built: Blueprint) -> dict[str, Any]:
    """Return what generation heeds in the source's config.json; empty if that is special tokens alone.

    Tokens are among it if the result's config.json has others. It is empty, too, if the source has a file of
    its own for them.
    """
    if (built.source.folder / FILE).exists():
        return {}
    said, made = heeded(built.source.config), heeded(built.stored_config())
    settings = said.keys() - {*_TOKENS}
    return said if settings or _lost(said, made) else {}


def write(built: Blueprint, folder: Path) -> dict[str, str]:
    """Write what the result's config.json does not say; return the file and the reason, if there is one.

    Nothing is written if the source has a file of its own, which is carried over.
    """
    said = of(built)
    if not _lost(said, heeded(built.stored_config())):
        return {}
    whole_file.write_json(folder / FILE, said)
    return {FILE: "the source has these settings in its config.json"}


def heeded(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a config.json that are not the usual ones, with its special tokens.

    Of a multimodal model, transformers takes those of the text model where it has none of its own.
    """
    within: Mapping[str, Any] = next((raw[part] for part in _PARTS if raw.get(part)), {})
    places = [raw, within] if isinstance(within, Mapping) else [raw]
    found = {}
    for key in (*_TOKENS, *USUAL):
        values = (place.get(key) for place in places)
        value = next((value for value in values if value is not None and value != USUAL.get(key)), None)
        if value is not None:
            found[key] = value
    return found


def _lost(said: Mapping[str, Any], made: Mapping[str, Any]) -> bool:
    return any(made.get(key) != value for key, value in said.items())
