"""The base classes of tables: `Settings`, whose fields are keys, and `Named`, whose name decides its keys."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self, cast, get_type_hints

from upcycle import registry
from upcycle.errors import UpcycleError
from upcycle.settings.ranges import refuse_outside


def hints(cls: type) -> dict[str, Any]:
    """Return the annotations of the fields of a dataclass, with their metadata, by field."""
    return _hints(cast(Hashable, cls))


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    found = get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def keys(cls: type) -> tuple[str, ...]:
    """Return the keys of a table, which are the fields of its dataclass."""
    return tuple(field.name for field in dataclasses.fields(cls))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A table of settings. A subclass is a frozen dataclass, and its fields are the keys.

    Every value of an instance is in its range, however the instance was made. A `__post_init__` that checks
    several keys together begins with `super().__post_init__()`.
    """

    section: ClassVar[str] = ""  # the name of the table in errors

    def __post_init__(self) -> None:
        prefix = f"{self.section}." if self.section else ""
        for name, hint in hints(type(self)).items():
            refuse_outside(getattr(self, name), hint, prefix + name)

    def _make_absolute(self, key: str) -> None:
        """Make the path of an existing file absolute, because a recipe is stored with its result and may be
        read elsewhere."""
        if (path := Path(getattr(self, key))).is_file():
            object.__setattr__(self, key, str(path.resolve()))

    def as_table(self) -> dict[str, Any]:
        """Return the settings as a nested table.

        TOML has no null, so a key whose value is None is left out.
        """
        own = {name: _plain(getattr(self, name)) for name in keys(type(self))}
        return {name: value for name, value in own.items() if value is not None}


def _plain(value: Any) -> Any:
    """Convert a value to the form it has in a table."""
    if isinstance(value, Settings):
        return value.as_table()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named(Settings):
    """A table whose key `name` decides which other keys it has.

    A family is a subclass that sets `package`. Each file `NAME.py` of that package defines one member: a
    dataclass that derives from the family, assigned to the module variable named like its `section`. The
    reader only needs a field of the family's type to read such a table.
    """

    package: ClassVar[str]  # the package with the files; `__name__` in the package itself
    noun: ClassVar[str] = ""  # the noun for a member in errors; the section, if empty
    usual: ClassVar[str | None] = None  # the name if the table has none; None: a name is required
    common: ClassVar[tuple[str, ...]] = ()  # keys that stay if a file merged over this one changes the name

    @property
    def name(self) -> str:
        """The name in the table, which is that of the file."""
        return self.file_name()

    @classmethod
    def file_name(cls) -> str:
        """Return the name of the file that defines the class."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def is_family(cls) -> bool:
        """Return whether this is a family, not a member of one."""
        return "package" in vars(cls)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all members of the family."""
        return registry.names(cls._files())

    @classmethod
    def find(cls, name: str) -> type[Self]:
        """Return the member called `name`. Raises `UpcycleError`, with the known names, if there is none."""
        found: type[Self] = registry.find(cls._files(), name, cls.section, cls.noun or cls.section)
        return found

    @classmethod
    def chosen(cls, given: Any) -> type[Self]:
        """Return the member for the name `given`, or the usual one if `given` is None."""
        name = cls.usual if given is None else given
        if name is None:
            raise UpcycleError(f"[{cls.section}] has no name; allowed: {', '.join(cls.names())}")
        return cls.find(name)

    @classmethod
    def _files(cls) -> ModuleType:
        return importlib.import_module(cls.package)

    def as_table(self) -> dict[str, Any]:
        """Return the settings as a nested table, with its name."""
        return {"name": self.name, **super().as_table()}
