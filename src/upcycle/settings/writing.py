"""Tables of settings as the text of a TOML file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def sections(table: Mapping[str, Any], at: str = "") -> list[list[str]]:
    """Return the lines of a table at `at`, and of the tables and the lists of tables within it.

    A key whose value is None is left out, because TOML has no null, and so is a table without a key.
    """
    own = [f"{key} = {value(each)}" for key, each in table.items() if each is not None and not _inner(each)]
    out = [[f"[{at}]", *own] if at else own] if own else []
    for key, each in table.items():
        place = f"{at}.{key}" if at else key
        if isinstance(each, Mapping):
            out += sections(each, place)
        elif _inner(each):
            out += [[f"[[{place}]]", *(f"{k} = {value(v)}" for k, v in item.items())] for item in each]
    return out


def text(table: Mapping[str, Any], head: list[str] | None = None) -> str:
    """Return the text of a file: the lines `head`, and the sections of a table."""
    return "\n\n".join("\n".join(section) for section in (head or [], *sections(table)) if section) + "\n"


def value(given: Any) -> str:
    """Return a value as TOML writes it; its numbers, truth values, strings and lists are those of JSON."""
    return json.dumps(given, ensure_ascii=False).replace("\x7f", "\\u007f")


def _inner(given: Any) -> bool:
    """Return whether a value is a table or a list of tables."""
    return isinstance(given, Mapping) or (
        isinstance(given, (list, tuple)) and bool(given) and all(isinstance(each, Mapping) for each in given)
    )
