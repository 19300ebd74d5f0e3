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


def of(built: Blueprint) -> dict[str, Any]:
    """Return the settings in the source's config.json, with its special tokens; empty if there are none.

    There are none either if the source has a file of its own for them.
    """
    raw = built.source.config
    unusual = {key: raw[key] for key, usual in USUAL.items() if raw.get(key) not in (None, usual)}
    if not unusual or (built.source.folder / FILE).exists():
        return {}
    return {key: raw[key] for key in _TOKENS if raw.get(key) is not None} | unusual


def write(built: Blueprint, folder: Path) -> dict[str, str]:
    """Write the settings that the result's config.json does not hold; return the file and the reason, if any.

    Nothing is written if the source has a file of its own, which is carried over.
    """
    made = built.stored_config()
    lost = {key: value for key, value in of(built).items() if key in _TOKENS or key not in made}
    if lost.keys() <= {*_TOKENS}:
        return {}
    whole_file.write_json(folder / FILE, lost)
    return {FILE: "the source has these settings in its config.json"}
