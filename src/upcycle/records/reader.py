"""The reader of records, which are frozen dataclasses whose annotations define a JSON document.

An unknown key is kept, so that a file of a newer version loses nothing when it is written again. A field
without a default is required. A field made by `sometimes` is left out of the file if it has its default.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from upcycle.checkpoints.header import refuse_special
from upcycle.errors import UpcycleError, shown

Table = Mapping[str, Any]  # part of a document whose keys are those of a recipe or a run file
LARGEST = 1 << 63  # integers must be smaller, so that arithmetic on them cannot overflow
DEEPEST = 128  # levels of objects and lists in a file


class DamagedError(UpcycleError):
    """A document does not match its record; `why` names the key."""

    def __init__(self, file: str, why: str) -> None:
        super().__init__(f"{file} is damaged: {why}")
        self.why = why


class WrongError(ValueError):
    """A value does not match its key; `keys` is the path to it, the outermost key first."""

    def __init__(self, why: str, *keys: str) -> None:
        super().__init__(why)
        self.keys = [*keys]

    def __str__(self) -> str:
        return f"{'.'.join(self.keys)} {self.args[0]}" if self.keys else f"it {self.args[0]}"


def sometimes(default: Any = None) -> Any:
    """Define a field that is written only if its value differs from `default`."""
    return field(default=default, metadata={"sometimes": True})


@dataclass(frozen=True, kw_only=True)
class Record:
    """A table in a JSON document."""

    unknown: Table = field(default_factory=dict, repr=False)  # unknown keys, from other versions

    def as_table(self) -> dict[str, Any]:
        """Return the record as JSON, with the keys in the order of the fields."""
        return {
            known.name: _plain(value)
            for known in _fields(type(self))
            if (value := getattr(self, known.name)) != known.default or "sometimes" not in known.metadata
        } | dict(self.unknown)


@dataclass(frozen=True, kw_only=True)
class Document(Record):
    """A record that is a whole file or a line of one.

    `format` is the format number that this version writes and reads.
    """

    FILE: ClassVar[str]
    FORMAT: ClassVar[int] = 1

    @classmethod
    def of(cls, table: object, file: str) -> Self:
        """Make the record of a table; `file` is the name of the file in errors.

        Raises `DamagedError` if a key is missing or has a wrong value, and `UpcycleError` if this version
        does not read the format of the table.
        """
        found = table.get("format") if isinstance(table, Mapping) else None
        if found != cls.FORMAT and type(found) is int:
            raise UpcycleError(f"{file} has format {shown(found)}; this version reads {cls.FORMAT}")
        try:
            kind: Any = cls
            made: Self = _converter(kind)(table)
        except WrongError as wrong:
            raise DamagedError(file, str(wrong)) from None
        return made


def load(path: Path, missing: str, file: str | None = None) -> dict[str, Any]:
    """Load the JSON object in `path`, unchecked; `missing` is the error if there is no such file.

    Raises `DamagedError` if the file holds anything but a JSON object; `file` is its name in the error.
    """
    file = file or str(path)
    refuse_special(path)
    try:
        found = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise UpcycleError(missing) from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(file, f"it is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise DamagedError(file, f"it holds {shown(found)}, not a JSON object")
    refuse_deep(found, file)
    return found


def refuse_deep(table: object, file: str) -> None:
    """Raise `DamagedError` for a JSON value that is nested too deep to be written again."""
    if _depth(table) > DEEPEST:
        raise DamagedError(file, f"it is nested deeper than {DEEPEST} levels, which no file of upcycle is")


def _depth(value: Any) -> int:
    """Return how many levels of objects and lists a JSON value has, without recursion."""
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, (dict, list))]:
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
        depth += 1
    return depth


def _plain(value: Any) -> Any:
    """Convert a value of a record to JSON."""
    if isinstance(value, Record):
        return value.as_table()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def _fields(kind: type[Record]) -> Sequence[Field[Any]]:
    return [known for known in fields(kind) if known.name != "unknown"]


@cache
def _converter(kind: Any) -> Callable[[Any], Any]:
    """Return a function that converts a JSON value to the type `kind`; it raises `WrongError`."""
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Record):
        return _record(kind)
    if origin in (Union, types.UnionType):
        return _either(inner)
    if origin is tuple:
        return _list(_converter(inner[0]))
    if origin is not None and issubclass(origin, Mapping):
        return _table(_converter(inner[1]))
    return {Any: lambda value: value, int: _whole, float: _number, bool: _bool, str: _text}[kind]


def _record(kind: type[Record]) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    known = {each.name: _converter(hints[each.name]) for each in _fields(kind)}
    needed = [each.name for each in _fields(kind) if each.default is each.default_factory is MISSING]

    def convert(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise WrongError(f"is {shown(value)}, not a table")
        made, unknown = {}, {}
        for key, inner in value.items():
            if key in known:
                made[key] = _at(key, known[key], inner)
            else:
                unknown[key] = inner
        for key in needed:
            if key not in made:
                raise WrongError("is missing in it", key)
        return kind(**made, unknown=unknown)

    return convert


def _either(kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Return a function that converts a value or null."""
    (kind,) = (each for each in kinds if each is not types.NoneType)
    convert = _converter(kind)
    return lambda value: None if value is None else convert(value)


def _list(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def all_of(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise WrongError(f"is {shown(value)}, not a list")
        return tuple(_at(str(place), convert, inner) for place, inner in enumerate(value))

    return all_of


def _table(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def all_of(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise WrongError(f"is {shown(value)}, not a table")
        return {key: _at(key, convert, inner) for key, inner in value.items()}

    return all_of


def _at(key: str, convert: Callable[[Any], Any], value: Any) -> Any:
    try:
        return convert(value)
    except WrongError as wrong:
        wrong.keys.insert(0, key)
        raise


def _whole(value: Any) -> int:
    if type(value) is not int or abs(value) >= LARGEST:
        raise WrongError(f"is {shown(value)}, not a whole number below 2^63")
    return value


def _number(value: Any) -> float:
    """Return a number as it is; our JSON may hold NaN and infinity."""
    if type(value) is not float and (type(value) is not int or abs(value) >= LARGEST):
        raise WrongError(f"is {shown(value)}, not a number")
    number: float = value
    return number


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise WrongError(f"is {shown(value)}, not true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise WrongError(f"is {shown(value)}, not a text")
    return value
