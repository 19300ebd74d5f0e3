"""The tables: `Settings`, whose fields are its keys, and `Named`, whose name decides which keys it has."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Hashable, Mapping
from types import ModuleType
from typing import Any, ClassVar, Self, cast, get_type_hints

from upcycle import registry
from upcycle.errors import UpcycleError
from upcycle.settings.ranges import refuse_outside


def hints(cls: type) -> dict[str, Any]:
    """The annotations of the fields of a dataclass, with their marks, by field."""
    return _hints(cast(Hashable, cls))


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    found = get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def keys(cls: type) -> tuple[str, ...]:
    """The keys of a table: the fields of its dataclass."""
    return tuple(field.name for field in dataclasses.fields(cls))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A table of keys. A subclass is a frozen dataclass, and its fields are the keys.

    An instance has every value in its range, however it was made. A `__post_init__` that relates several
    keys begins with `super().__post_init__()`.
    """

    section: ClassVar[str] = ""  # the name of the table, for errors

    def __post_init__(self) -> None:
        prefix = f"{self.section}." if self.section else ""
        for name, hint in hints(type(self)).items():
            refuse_outside(getattr(self, name), hint, prefix + name)

    def as_table(self) -> dict[str, Any]:
        """The settings as a nested table. TOML has no null: a key that is None is left out."""
        own = {name: _plain(getattr(self, name)) for name in keys(type(self))}
        return {name: value for name, value in own.items() if value is not None}


def _plain(value: Any) -> Any:
    """A value as a table has it."""
    if isinstance(value, Settings):
        return value.as_table()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named(Settings):
    """A table whose key `name` decides which other keys it has.

    A family is the subclass that says `package`: each file `NAME.py` of that package is one of the family, a
    dataclass deriving from it and bound to a module name that is its `section`. A field of the family's type
    is all that the reader needs to read such a table.
    """

    package: ClassVar[str]  # where the files are: `__name__`, in the package itself
    noun: ClassVar[str] = ""  # what one of the family is called in errors; the section, if not given
    usual: ClassVar[str | None] = None  # the name of a table that has none; None: it must have one
    common: ClassVar[tuple[str, ...]] = ()  # keys that stay if a file over this one changes the name

    @property
    def name(self) -> str:
        """The name in the table: that of the file."""
        return self.file_name()

    @classmethod
    def file_name(cls) -> str:
        """The name of the file that defines it."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def is_family(cls) -> bool:
        """Whether this is a family, and not one of its kinds."""
        return "package" in vars(cls)

    @classmethod
    def names(cls) -> list[str]:
        """The names of all of the family."""
        return registry.names(cls._files())

    @classmethod
    def find(cls, name: str) -> type[Self]:
        """The one called `name`. Raises `UpcycleError` with the names that there are."""
        found: type[Self] = registry.find(cls._files(), name, cls.section, cls.noun or cls.section)
        return found

    @classmethod
    def chosen(cls, given: Any) -> type[Self]:
        """The one that a table means by the name `given`, or by None if it has no name."""
        name = cls.usual if given is None else given
        if name is None:
            raise UpcycleError(f"[{cls.section}] has no name; allowed: {', '.join(cls.names())}")
        return cls.find(name)

    @classmethod
    def _files(cls) -> ModuleType:
        return importlib.import_module(cls.package)

    def as_table(self) -> dict[str, Any]:
        """The settings as a nested table with its name."""
        return {"name": self.name, **super().as_table()}
