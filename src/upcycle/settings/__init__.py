"""Typed tables: what a user may set, as TOML, `--set KEY=VALUE`, a dictionary or Python keyword arguments.

A table is a frozen dataclass deriving from `Settings`. Its fields are its keys; the range of a key stands in
the annotation of its field (`ranges.py`) and is checked wherever an instance is made. A table whose keys
depend on a name derives from `Named`. The reader (`reading.py`) knows no table by name: it follows the types.
`files.py` reads TOML and lays one file, or `--set`, over another. Nothing here imports numpy or torch.
"""

from upcycle.settings.files import Layout, families, override, read_toml
from upcycle.settings.ranges import Above, AtLeast, Finite, Verbatim, Within, alternatives, options
from upcycle.settings.reading import parted, read, table_at
from upcycle.settings.tables import Named, Settings, hints, keys

__all__ = [
    "Above", "AtLeast", "Finite", "Layout", "Named", "Settings", "Verbatim", "Within", "alternatives",
    "families", "hints", "keys", "options", "override", "parted", "read", "read_toml", "table_at",
]  # fmt: skip
