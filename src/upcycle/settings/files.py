"""TOML files, merged over one another by `base = FILE`, with `--set KEY=VALUE` over both."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError, cut, shown
from upcycle.settings.ranges import options
from upcycle.settings.reading import refuse_extreme, table_at
from upcycle.settings.tables import Named, hints, keys

DEEPEST = 16  # the deepest nesting of tables and lists that is accepted; no key lies so deep
MOST_PARTS = 200  # the most parts of a dotted key, checked before it is parsed

Without = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """The facts that are needed to merge one file over another. Places are dotted: `decoder.router`."""

    named: Mapping[str, type[Named]] = field(default_factory=dict)  # families of tables, by place
    short: Collection[str] = ()  # tables that their name alone may stand for, by place
    shared: Mapping[str, type] = field(default_factory=dict)  # other types that read keys of a table
    follows: Mapping[str, str] = field(default_factory=dict)  # the place whose name a nameless table has
    off: Mapping[str, Without] = field(default_factory=dict)  # what `KEY = false` does to the whole file
    rivals: Mapping[str, str] = field(default_factory=dict)  # keys, and the one that each takes the place of

    def name_at(self, table: Mapping[str, Any], place: str) -> Any:
        """Return the name in the table at `place`, or the one that applies if it has none."""
        inner: Any = table
        for section in place.split("."):
            inner = table_at(inner.get(section, {}), section)
        if "name" in inner:
            return inner["name"]
        return self.name_at(table, self.follows[place]) if place in self.follows else self.named[place].usual

    def rename(self, section: dict[str, Any], place: str) -> None:
        """Remove the keys that belong to the old name of a section, because its name changes."""
        kept = {*self.named[place].common, *(keys(self.shared[place]) if place in self.shared else ())}
        for key in [key for key in section if key not in kept]:
            del section[key]

    def give_way(self, below: dict[str, Any], is_above: Callable[[str], bool]) -> None:
        """Remove the keys of a table whose rivals, and not they, are in what is laid over it."""
        for key, other in self.rivals.items():
            section, _, last = other.rpartition(".")
            if is_above(key) and not is_above(other) and (found := _section(below, section)) is not None:
                found.pop(last, None)

    def turn(self, setting: str) -> int:
        """Return the rank of a setting: whole files come first, then names from the outermost in."""
        key = setting.partition("=")[0].replace(" ", "")
        place, _, last = key.rpartition(".")
        if key in self.off:
            return -1
        return [*self.named].index(place) if last == "name" and place in self.named else len(self.named)


def families(cls: type, at: str = "") -> dict[str, type[Named]]:
    """Return the families among the fields of a dataclass, by the places of their tables below `at`."""
    return {
        f"{at}.{name}" if at else name: option
        for name, hint in hints(cls).items()
        for option in options(hint)
        if isinstance(option, type) and issubclass(option, Named)
    }


def read_toml(path: str | Path, what: str, layout: FileLayout) -> dict[str, Any]:
    """Read the table in a TOML file.

    If it has `base = FILE` (relative to the file's own folder), it is merged over that file: tables key by
    key, all other values as a whole. `what` names the kind of file in errors.
    """
    return _read_toml(Path(path), what, layout, ())


def override(table: Mapping[str, Any], settings: Iterable[str], layout: FileLayout) -> dict[str, Any]:
    """Return `table` with each `section.key=value` of `settings` set.

    A value that is not TOML is a string.
    """
    out: dict[str, Any] = copy.deepcopy(dict(table))
    settings = [*settings]
    layout.give_way(out, {setting.partition("=")[0].strip() for setting in settings}.__contains__)
    # Names come first: they decide which of the file's keys beside them still apply.
    for setting in sorted(settings, key=layout.turn):
        dotted, equals, text = setting.partition("=")
        *sections, last = dotted.strip().split(".")
        if not equals or not all([*sections, last]) or len(sections) > DEEPEST:
            raise UpcycleError(f"--set {cut(setting)}: expected KEY=VALUE, such as moe.top_k=2")
        try:
            value = _parsed(f"value = {text}")["value"]
        except ValueError:
            value = text.strip()
        if value is False and dotted.strip() in layout.off:
            out = layout.off[dotted.strip()](out)
        target, place = out, ""
        for section in sections:
            place = f"{place}.{section}" if place else section
            if place in layout.short and isinstance(target.get(section), str):
                target[section] = {"name": target[section]}
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise UpcycleError(f"--set {cut(setting)}: {section} is a single value, not a section")
        if last == "name" and place in layout.named and layout.name_at(out, place) != value:
            layout.rename(target, place)
        target[last] = value
    return out


def _read_toml(path: Path, what: str, layout: FileLayout, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UpcycleError(f"no {what} at {path}") from None
    except IsADirectoryError:
        raise UpcycleError(f"{path} is a folder; a {what} is a TOML file") from None
    except OSError as error:
        raise UpcycleError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UpcycleError(f"{path} is not TOML: it is not UTF-8 text ({error.reason})") from None
    except ValueError:  # from the path
        raise UpcycleError(f"{shown(str(path))} is no path of a {what}: it holds a NUL character") from None
    try:
        table = _parsed(text)
    except ValueError as error:
        raise UpcycleError(f"{path} is not TOML: {error}") from None
    if "base" not in table:
        return table
    base = table.pop("base")
    refuse_extreme(base, "base")
    if not isinstance(base, str):
        raise UpcycleError(f"base = {shown(base)} in {path}; it must be the name of a TOML file")
    seen = (*seen, path.resolve())
    under = path.parent / base
    if under.resolve() in seen:
        raise UpcycleError(f"{path} is based on {base}, which is based on it")
    below = _read_toml(under, f"{what} (the base of {path.name})", layout, seen)
    for key, without in layout.off.items():
        if table.get(key) is False:
            below = without(below)
    for place in layout.named:
        own, found = _section(table, place), _section(below, place)
        if own is not None and found is not None:
            name = layout.name_at(below, place)
            if own.get("name", name) != name:
                layout.rename(found, place)
    layout.give_way(below, lambda key: _has(table, key))
    return _over(below, table)


def _parsed(text: str) -> dict[str, Any]:
    """Parse TOML; raise ValueError, with the reason, if the table cannot be used."""
    # The memory that tomllib takes grows with the square of the number of parts of a key.
    if any(key.count(".") > MOST_PARTS for key in re.split(r"[=,\n]", text)):
        raise ValueError("it has a key of too many parts")
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _too_deep(table):
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    return table


def _too_deep(value: Any) -> bool:
    """Return whether tables and lists are nested deeper than any key is."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def _section(table: Any, place: str) -> dict[str, Any] | None:
    """Return the table at `place`, or None if there is none."""
    for section in place.split("."):
        table = table.get(section) if isinstance(table, dict) else None
    return table if isinstance(table, dict) else None


def _has(table: Any, key: str) -> bool:
    """Return whether a table has a dotted key."""
    section, _, last = key.rpartition(".")
    return last in (_section(table, section) or ())


def _over(under: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `table` over another one, tables key by key."""
    both = {
        key: _over(under[key], value)
        for key, value in table.items()
        if isinstance(value, dict) and isinstance(under.get(key), dict)
    }
    return {**under, **table, **both}
