"""The names of numbered classes, as `datasets` stores a ClassLabel in the schema of a parquet file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError


class NamesOfNumbers(tuple[str, ...]):
    """Names of classes that the data stores as numbers, in the order of the numbers."""

    __slots__ = ()


def names_in(schema: Any, column: str) -> tuple[str, ...]:
    """Return the names of the classes of a column in the order of their numbers; empty if there are none.

    `schema` is the schema of a parquet file as pyarrow reads it (`ParquetFile.schema_arrow`).
    """
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
        return NamesOfNumbers(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else ()
    except (KeyError, TypeError, ValueError):
        return ()


def common(named: Iterable[tuple[Path, tuple[str, ...]]]) -> tuple[str, ...]:
    """Return the names that files of one data set store; empty if none does.

    `named` has each file with its names. Raises `UpcycleError` if two files name other classes.
    """
    found = {names: path for path, names in named if names}
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise UpcycleError(f"{first} and {second} name other classes; give files of one data set")
    return next(iter(found), ())
