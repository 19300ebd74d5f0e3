"""The reader: it turns tables into dataclasses, and says in errors which keys and values are allowed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from upcycle.errors import UpcycleError, cut, nearest, shown
from upcycle.settings.ranges import is_verbatim, options, refuse_outside
from upcycle.settings.tables import Named, hints, keys

T = TypeVar("T")
_PLAIN = {int: "whole number", float: "a number", str: "string", bool: "true or false"}
_NOT = object()  # marks a value that does not have the type


def read(
    cls: Callable[..., T],
    table: Mapping[str, Any],
    where: str = "",
    *,
    made: Mapping[str, Any] | None = None,
    beside: Mapping[str, type | None] | None = None,
) -> T:
    """Make an instance of the dataclass `cls` from the table at `where`, a dotted place.

    `made` holds the values of fields that are not keys of this table. `beside` names keys of the table that
    others read, with their dataclasses, so that errors about unknown keys can list them. Raises
    `UpcycleError` for an unknown key, a value of the wrong type or out of range, and a missing key.
    """
    kind: Any = cls
    label, family = where, None
    if _is_family(kind):
        table, family = dict(table), kind
        kind = kind.chosen(table.pop("name", None))
        label = f"{where} ({kind.file_name()})"
    made, beside = made or {}, beside or {}
    known = {name: hint for name, hint in hints(kind).items() if name not in made}
    for key in table:
        if key not in known:
            unknown = cut(f"{label}.{key}" if label else str(key))
            whose = _of_others(key, family) or _known(key, table, known, beside, top=not where)
            raise UpcycleError(f"unknown key {unknown}{whose}")
    prefix = f"{where}." if where else ""
    values = dict(made)
    values |= {name: _value(given, known[name], prefix + name) for name, given in table.items()}
    for field in dataclasses.fields(kind):
        if field.name not in values and _is_required(field):
            raise UpcycleError(f"{prefix}{field.name} is missing; it has no default")
    made_of: T = kind(**values)
    return made_of


def _is_family(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, Named) and cls.is_family()


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def parted(table: Mapping[str, Any], *types: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a table that several types share: the keys that one of `types` reads, and the others."""
    theirs = {key for cls in types for key in keys(cls)}
    own = {k: v for k, v in table.items() if k in theirs}
    return own, {k: v for k, v in table.items() if k not in theirs}


def table_at(value: Any, where: str) -> Mapping[str, Any]:
    """Return `value` if it is a table; `where` is its place, for the error."""
    if not isinstance(value, Mapping):
        raise UpcycleError(f"[{where}] must be a section with keys, not {shown(value)}")
    return value


def refuse_extreme(value: Any, key: str, *, verbatim: bool = False) -> None:
    """Raise an error for an integer of more than 64 bits, and for a NUL in a text that is not `verbatim`."""
    if isinstance(value, str) and "\0" in value and not verbatim:
        raise UpcycleError(f"{key} = {shown(value)} holds a NUL character, which no path and no name has")
    if isinstance(value, int) and abs(value) >= 1 << 64:
        raise UpcycleError(f"{key} is a whole number of more than 64 bits; give a smaller one")


def _value(value: Any, hint: Any, key: str) -> Any:
    """Convert `value` to the annotation `hint`, or raise an error that says what is allowed."""
    allowed = [option for option in options(hint) if option is not type(None)]
    for option in allowed:
        if (found := _as(value, option, key, is_verbatim(hint))) is not _NOT:
            refuse_outside(found, hint, key)
            return found
    raise UpcycleError(f"{key} = {shown(value)}; allowed: {' or '.join(map(_allowed, allowed))}")


def _as(value: Any, option: Any, key: str, verbatim: bool) -> Any:
    """Convert `value` to one type, or return `_NOT`."""
    if dataclasses.is_dataclass(option):
        return read(option, table_at(value, key), key)  # type: ignore[arg-type]
    if get_origin(option) is tuple:
        return _items(value, *options(get_args(option)[0]), key=key, verbatim=verbatim)
    if get_origin(option) is Literal:
        return value if value in get_args(option) and not isinstance(value, bool) else _NOT
    if option is str and isinstance(value, Path):
        return str(value)
    if type(value) is not option and (option is not float or type(value) is not int):
        return _NOT
    refuse_extreme(value, key, verbatim=verbatim)
    return option(value)


def _items(value: Any, item: Any, *, key: str, verbatim: bool) -> Any:
    """Convert `value` to a tuple with items of one type, or return `_NOT`."""
    tables = dataclasses.is_dataclass(item)
    if not isinstance(value, (list, tuple)):
        if tables:
            raise UpcycleError(f"[[{key}]] must be a list of sections, not {shown(value)}")
        return _NOT
    places = [f"{key}[{i}]" if tables else key for i in range(len(value))]
    found = tuple(_as(v, item, place, verbatim) for v, place in zip(value, places, strict=True))
    return _NOT if any(v is _NOT for v in found) else found


def _allowed(option: Any) -> str:
    """Describe in words what a type accepts."""
    if get_origin(option) is Literal:
        return ", ".join(get_args(option))
    if get_origin(option) is tuple:
        (item,) = options(get_args(option)[0])
        if get_origin(item) is Literal:
            return f"{_allowed(item)}, in a list"
        return f"a list of {_allowed(item).removeprefix('a ')}s"
    return _PLAIN[option]


def _of_others(key: str, family: Any) -> str:
    """Return the end of an error about a key that other members of a family have; empty if none does."""
    names = [name for name in family.names() if key in keys(family.find(name))] if family else []
    return f"; it is a key of {family.section} {', '.join(names)}" if names else ""


def _known(
    key: str, table: Mapping[str, Any], known: Mapping[str, Any], beside: Mapping[str, Any], *, top: bool
) -> str:
    """Return the end of an error about an unknown key: the section it belongs to, and the known keys."""
    names = [*known, *beside, *(["base"] if top else [])]
    for name, hint in {**known, **beside}.items():
        if any(key in _keys(option, table.get(name)) for option in options(hint)):
            return f"; did you mean {name}.{key}? Known: {', '.join(sorted(names))}"
    if key == "base":
        return "; a file names its base itself, at its top"
    return nearest(key, names)


def _keys(option: Any, given: Any) -> tuple[str, ...]:
    """Return the keys of a section of a type; `given` is its value in the table."""
    if _is_family(option):
        # The reader of the section reports a wrong name; here it has the keys of its family.
        with contextlib.suppress(UpcycleError):
            option = option.chosen(given.get("name") if isinstance(given, Mapping) else None)
    return keys(option) if dataclasses.is_dataclass(option) and isinstance(option, type) else ()
