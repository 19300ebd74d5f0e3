"""Conversion of the paths that users pass: text or `Path`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError, shown


def as_paths(instance: Any, *fields: str) -> None:
    """Convert the paths in these fields of a frozen dataclass to `Path`: single ones, lists or mappings."""
    for field in fields:
        object.__setattr__(instance, field, _path(getattr(instance, field), field))


def _path(value: Any, field: str) -> Any:
    if value is None or isinstance(value, Path):
        return value
    if isinstance(value, str) and "\0" not in value:
        return Path(value)
    if isinstance(value, Mapping):
        return {name: _path(one, field) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_path(one, field) for one in value)
    raise UpcycleError(f"{field} = {shown(value)} is no path; give text or a Path")
