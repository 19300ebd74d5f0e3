"""What config.json says of the base model of a configuration, if that is a folder on this machine."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from upcycle import families
from upcycle.checkpoints.checkpoint import read_json
from upcycle.errors import UpcycleError
from upcycle.families import Config
from upcycle.targets import native


def hidden_size(source: str) -> int:
    """Return the channels of a model; 0 if that cannot be told."""
    found = (_config(source) or {}).get("hidden_size")
    return found if isinstance(found, int) and found > 0 else 0


def natives(source: str) -> tuple[str, list[str]] | None:
    """Return the model_type of a model's family, and the native targets that compute the same as the model.

    The default comes first. None if the family cannot be told; `convert` gives the reason.
    """
    if (raw := _config(source)) is None:
        return None
    with suppress(UpcycleError):
        family = families.of(raw)
        return family.model_type, native.fitting(family, family.config(raw))
    return None


def _config(source: str) -> Config | None:
    file = Path(source) / "config.json"
    return read_json(file, f"{file} is gone") if file.is_file() else None
