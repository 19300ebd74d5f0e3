"""The names of numbered classes, as `datasets` stores a ClassLabel in the schema of a parquet file."""

from __future__ import annotations

import json
from typing import Any


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
