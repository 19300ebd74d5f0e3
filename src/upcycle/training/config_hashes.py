"""The hashes of the configs of checkpoints, key by key: with another config, weights are another model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.errors import listed

ConfigHashes = Mapping[str, Mapping[str, str]]  # SHA-256 of the value of each key, by checkpoint and key

_IDLE = ("transformers_version", "_name_or_path")  # keys that say who wrote a config, also those of its parts


def of(checkpoints: Sequence[Checkpoint]) -> ConfigHashes:
    """Return the hashes of the configs of checkpoints, by label and key."""
    return {opened.label: of_config(opened.config) for opened in checkpoints}


def of_config(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the hash of the value of each key of a config, however the file spells it."""
    told = ((key, json.dumps(value, sort_keys=True)) for key, value in _telling(config).items())
    return {key: hashlib.sha256(value.encode()).hexdigest() for key, value in told}


def changed(checkpoints: Sequence[Checkpoint], before: ConfigHashes | None) -> str | None:
    """Return a phrase that names what changed in the first config that did; None if none has.

    `before` is None in the record of an earlier version, which knows no configs.
    """
    if before is None:
        return None
    for opened in checkpoints:
        then, now = before.get(opened.label, {}), of_config(opened.config)
        if keys := sorted(key for key in {*then, *now} if then.get(key) != now.get(key)):
            return f"{listed(keys)} in {opened.config_file} of the {opened.label} {opened.name}"
    return None


def _telling(value: Any) -> Any:
    """Return a JSON value without the keys that change no model."""
    if isinstance(value, Mapping):
        return {key: _telling(inner) for key, inner in value.items() if key not in _IDLE}
    return [*map(_telling, value)] if isinstance(value, list) else value
