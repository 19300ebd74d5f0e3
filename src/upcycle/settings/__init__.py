"""Typed tables of settings, read from TOML, `--set KEY=VALUE`, a dictionary or Python keyword arguments.

A table is a frozen dataclass that derives from `Settings`, and its fields are its keys. The range of a key is
in the annotation of its field (`ranges.py`) and is checked whenever an instance is made. A table whose keys
depend on a name derives from `Named`. The reader (`reading.py`) knows no table by name: it follows the types.
`files.py` reads TOML and merges files and `--set`. Nothing here imports numpy or torch.
"""

from upcycle.settings.files import FileLayout, families, override, read_toml
from upcycle.settings.ranges import Above, AtLeast, Finite, Verbatim, Within, alternatives, options
from upcycle.settings.reading import parted, read, table_at
from upcycle.settings.tables import Named, Settings, hints, keys

__all__ = [
    "Above", "AtLeast", "FileLayout", "Finite", "Named", "Settings", "Verbatim", "Within", "alternatives",
    "families", "hints", "keys", "options", "override", "parted", "read", "read_toml", "table_at",
]  # fmt: skip
