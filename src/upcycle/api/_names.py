"""Names that a caller gives: lists of them, and what has a name each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from upcycle.errors import UpcycleError, shown


def names(given: Iterable[str], argument: str) -> tuple[str, ...]:
    """Return a list of names. Raises `UpcycleError` for a text, of which Python would take each letter."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UpcycleError(
            f"{argument} = {shown(given)}; give a list of names, such as [{shown(str(given))}]"
        )
    return tuple(given)


def refuse_unnamed(given: Mapping[str, str | Path] | None, argument: str) -> None:
    """Raise `UpcycleError` for a path that should have been a mapping of names to paths."""
    if given is not None and not isinstance(given, Mapping):
        raise UpcycleError(
            f"{argument} = {shown(given)}; give each path a name, such as {{'stories': {shown(str(given))}}}"
        )
