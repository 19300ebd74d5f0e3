"""What to build: the recipe, read from TOML, `--set KEY=VALUE` or a dictionary.

Frozen dataclasses; a key that nothing reads, a value of the wrong type and a choice that does not
exist are errors that name the key and what is allowed.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from upcycle.errors import UpcycleError, cut, shown

if TYPE_CHECKING:
    from upcycle.init import Init
    from upcycle.nn.routers import Router

DEEPEST = 16  # tables and lists in one another; no key lies so deep
MOST_PARTS = 200  # of a dotted key, before it is looked at
Layers = Literal["all", "every_other", "last_half"]

# Stacks of blocks that may have a table of their own.
STACKS = ("decoder", "stage_1", "stage_2", "stage_3", "stage_4")

# Keys of [router] in a run file that are about training, not about what is built.
OF_TRAINING = (
    "balance_loss", "balance_loss_coef", "balance_counts", "z_loss_coef", "bias_update_rate", "jitter",
    "importance_loss_coef", "load_loss_coef", "layers",
)  # fmt: skip

# Sections and keys of a run file that are about experts alone, besides part of [router].
OF_EXPERTS = ("moe", "init", "dtype", "successor", *STACKS)

# Settings that name what the other keys of their section belong to.
_NAMES = ("init.name", "router.name", *(f"{stack}.router.name" for stack in STACKS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moe:
    """The shape of the Mixture of Experts."""

    num_experts: int = 8  # in each layer
    top_k: int = 2  # experts that a token uses, of a router that lets tokens choose
    # which blocks get experts: a name, or their numbers from 0; every_other is 1, 3, 5, ...
    layers: Layers | tuple[int, ...] = "all"
    # native (the family's MoE class of transformers), one by name, upcycled, depth_tiled or dense
    target: str = "native"
    granularity: int = 1  # G: an expert is 1 / G of the dense network wide
    expert_width: int = 0  # neurons of an expert; 0: those of the dense network / granularity
    universal_experts: int = 0  # narrower experts beside them, for routers of slots (MoE Jetpack)
    universal_width: int = 0  # neurons of those; 0: a quarter of the others'
    shared_experts: int = 0  # 0, or G: the dense network itself stands beside the experts
    pooling: Literal["class_token", "mean"] = "class_token"  # what the head of an upcycled ViT sees
    depth: int = 2  # how often each block stands, for the target depth_tiled

    def __post_init__(self) -> None:
        for field in ("num_experts", "top_k", "granularity"):
            if getattr(self, field) < 1:
                raise UpcycleError(f"moe.{field} = {getattr(self, field)}; it must be 1 or more")
        for field in ("shared_experts", "expert_width", "universal_experts", "universal_width"):
            if getattr(self, field) < 0:
                raise UpcycleError(f"moe.{field} = {getattr(self, field)}; it must be 0 or more")
        if self.expert_width and self.granularity > 1:
            raise UpcycleError(
                "moe.expert_width and moe.granularity both say how wide an expert is; give one"
            )
        if self.top_k > self.num_experts:
            raise UpcycleError(
                f"moe.top_k = {self.top_k} is more than moe.num_experts = {self.num_experts}; "
                f"a token cannot use more experts than there are"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Successor:
    """The smaller dense model that a larger one, the source, is narrowed to; its experts come from the
    source.

    `hidden_size` in a model of several stages is a list; 0 keeps the source's. `intermediate_size` 0 keeps
    the ratio. `rest`: where all but the experts comes from, the source itself or a checkpoint of the
    successor's size.
    """

    # channels of the narrower model; a list, one a stage, in a ConvNeXt; 0 keeps the source's
    hidden_size: int | tuple[int, ...] = 0
    intermediate_size: int = 0  # neurons of its networks; 0 keeps the ratio
    # where all but the experts comes from: predecessor (the source), or a checkpoint of that size
    rest: str = "predecessor"

    def __post_init__(self) -> None:
        if (
            self.rest != "predecessor" and Path(self.rest).is_dir()
        ):  # kept with its result, and read elsewhere
            object.__setattr__(self, "rest", str(Path(self.rest).resolve()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The MoE layers of one stack of blocks and their router."""

    moe: Moe
    router: Router


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the bytes of the output, besides the bytes of the source.

    `parts` are stacks of blocks that are not as `moe` and `router` say: in TOML, `[decoder.moe]` and
    `[decoder.router]` with the keys that differ, and likewise `[stage_1]` to `[stage_4]` in a ConvNeXt.
    """

    seed: int = 0  # of every random number
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"  # of the weights that are written
    moe: Moe = Moe()
    init: Init
    router: Router
    successor: Successor | None = None
    parts: Mapping[str, Part] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, given: Recipe | Mapping[str, Any] | str | Path | None = None, /, **sections: Any) -> Recipe:
        """A recipe from what there is: a nested table as TOML has it, `Recipe.of(moe={"num_experts": 4})`, a
        TOML file by its path, or a recipe. `sections` go over it."""
        from upcycle import init
        from upcycle.nn import routers

        if isinstance(given, Recipe) and not sections:
            return given
        data = {**_given(given), **sections}
        options = dict(_table(data.pop("init", {}), "init"))
        router = _table(data.pop("router", {}), "router")
        name = options.pop("name", "copy")
        found = init.find(name)
        made: dict[str, Any] = {
            "init": read(found, options, f"init ({name})"),
            "router": routers.read(router),
            "parts": {
                name: _part(name, data.pop(name), _table(data.get("moe", {}), "moe"), router)
                for name in STACKS
                if name in data
            },
        }
        made["successor"] = None
        if "successor" in data:
            made["successor"] = read(Successor, _table(data.pop("successor"), "successor"), "successor")
        if data.get("moe") is False:
            raise UpcycleError(
                "moe = false trains the dense model itself, and a recipe is of experts; take it out"
            )
        beside = {"init": type(made["init"]), "router": type(made["router"]), "successor": Successor}
        return read(cls, data, "", made, {**beside, **dict.fromkeys(("base", *STACKS))})

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """The recipe in the TOML file `path`, a recipe or a run file, with `KEY=VALUE` overrides."""
        return cls.of(override(of_run_file(read_toml(path)), overrides))

    def at(self, stack: str) -> Recipe:
        """The recipe for one stack of blocks."""
        part = self.parts.get(stack) or Part(moe=self.moe, router=self.router)
        return dataclasses.replace(self, moe=part.moe, router=part.router, parts={})

    def as_table(self) -> dict[str, Any]:
        """The recipe as a nested table: what `Recipe.of` takes and the provenance keeps."""
        table = dataclasses.asdict(self)
        table |= {"init": {"name": self.init.name, **table["init"]}, "router": self.router.as_table()}
        del table["parts"]
        if self.successor is None:
            del table["successor"]
        for name, part in self.parts.items():
            table[name] = {"moe": dataclasses.asdict(part.moe), "router": part.router.as_table()}
        return table


RecipeLike = Recipe | Mapping[str, Any] | str | Path | None  # what functions take for a recipe: `Recipe.of`


def _part(name: str, value: Any, moe: Mapping[str, Any], router: Mapping[str, Any]) -> Part:
    """The part of a stack from its own table and those of the model."""
    from upcycle.nn import routers

    other = dict(_table(value, name))
    own = _table(other.pop("moe", {}), f"{name}.moe")
    of_the_model = {"target": Moe.target, "pooling": Moe.pooling, "depth": Moe.depth}
    if name.startswith("stage_"):
        of_the_model["layers"] = Moe.layers  # counted through all stages
    for key, default in of_the_model.items():
        if own.get(key, moe.get(key, default)) != moe.get(key, default):
            raise UpcycleError(f"{name}.moe.{key}: a model has one; set moe.{key}")
    changed = _table(other.pop("router", {}), f"{name}.router")
    if changed.get("name", router.get("name", "top_k")) != router.get("name", "top_k"):
        router = {k: v for k, v in router.items() if k in _of_every_router()}
    if other:
        raise UpcycleError(f"unknown key {name}.{next(iter(other))}; Known: moe, router")
    return Part(
        moe=read(Moe, {**moe, **own}, f"{name}.moe"),
        router=routers.read({**router, **changed}, f"{name}.router"),
    )


def _given(given: Any) -> dict[str, Any]:
    """What a caller has of a recipe, as a table."""
    if given is None:
        return {}
    if isinstance(given, Recipe):
        return given.as_table()
    if isinstance(given, (str, Path)):
        return of_run_file(read_toml(given))
    if isinstance(given, Mapping):
        return dict(given)
    raise UpcycleError(
        f"{shown(given)} is no recipe; give a Recipe, a table such as {{'moe': {{'num_experts': 8}}}}, or "
        f"the path of a TOML file"
    )


def read_toml(path: str | Path, what: str = "recipe") -> dict[str, Any]:
    """The table in a TOML file. With `base = FILE` (from the file's own folder) it goes over that one's:
    tables key by key, everything else whole. `KEY = false` takes a table of the base away."""
    return _read_toml(Path(path), what, ())


def _read_toml(path: Path, what: str, seen: tuple[Path, ...]) -> dict[str, Any]:
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
    except ValueError:  # of the path
        raise UpcycleError(f"{shown(str(path))} is no path of a {what}: it holds a NUL character") from None
    try:
        table = _parsed(text)
    except ValueError as error:
        raise UpcycleError(f"{path} is not TOML: {error}") from None
    if "base" not in table:
        return table
    base = table.pop("base")
    if not isinstance(base, str) or not _sane(base, "base"):
        raise UpcycleError(f"base = {shown(base)} in {path}; it must be the name of a TOML file")
    seen = (*seen, path.resolve())
    under = path.parent / base
    if under.resolve() in seen:
        raise UpcycleError(f"{path} is based on {base}, which is based on it")
    below = _read_toml(under, f"{what} (the base of {path.name})", seen)
    if table.get("moe") is False:
        below = _without_experts(below)
    for dotted in _NAMES:
        *sections, last = dotted.split(".")
        own, found = _section(table, sections), _section(below, sections)
        name = _named(below, sections)
        if own is not None and found is not None and own.get(last, name) != name:
            _clear(found, sections)
    return _over(below, table)


def _parsed(text: str) -> dict[str, Any]:
    """The table that TOML says; ValueError, with the reason, where it says none that can be used."""
    # tomllib takes memory by the square of a key's parts.
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
    """Whether tables and lists lie in one another deeper than any key does."""
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


def _section(table: Any, sections: list[str]) -> dict[str, Any] | None:
    """The table in it of that name, if there is one."""
    for section in sections:
        table = table.get(section) if isinstance(table, dict) else None
    return table if isinstance(table, dict) else None


def _clear(section: dict[str, Any], sections: list[str]) -> None:
    """Take out the keys that belong to the name of [init] or of a router, which is replaced; those that every
    router has, or a run reads, stay."""
    kept = () if sections == ["init"] else (*_of_every_router(), *OF_TRAINING)
    for key in [key for key in section if key not in kept]:
        del section[key]


def _without_experts(table: Mapping[str, Any]) -> dict[str, Any]:
    """`table` without what only a Mixture of Experts has: what `moe = false` takes away."""
    out = {k: v for k, v in table.items() if k not in OF_EXPERTS}
    if isinstance(router := out.get("router"), dict):
        out["router"] = {k: v for k, v in router.items() if k in OF_TRAINING}
    return out


def _over(under: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """`table` laid over another, tables key by key."""
    both = {
        key: _over(under[key], value)
        for key, value in table.items()
        if isinstance(value, dict) and isinstance(under.get(key), dict)
    }
    return {**under, **table, **both}


def of_run_file(table: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe in the table of a run file, which is a recipe and more; a recipe as it is."""
    if "source" not in table:
        return dict(table)
    out = {k: v for k, v in table.items() if k in {*(f.name for f in dataclasses.fields(Recipe)), *STACKS}}
    if isinstance(out.get("router"), Mapping):
        out["router"] = {k: v for k, v in out["router"].items() if k not in OF_TRAINING}
    return out


def override(table: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """`table` with each `section.key=value` of `settings` put in; a value that is not TOML is a string."""
    out: dict[str, Any] = copy.deepcopy(dict(table))
    # Names first: they decide which of the file's keys beside them still apply.
    for setting in sorted(settings, key=_place):
        dotted, equals, text = setting.partition("=")
        *sections, last = dotted.strip().split(".")
        if not equals or not all([*sections, last]) or len(sections) > DEEPEST:
            raise UpcycleError(f"--set {cut(setting)}: expected KEY=VALUE, such as moe.top_k=2")
        try:
            value = _parsed(f"value = {text}")["value"]
        except ValueError:
            value = text.strip()
        if dotted.strip() == "moe" and value is False:
            out = _without_experts(out)
        target = out
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise UpcycleError(f"--set {cut(setting)}: {section} is a single value, not a section")
        if ".".join([*sections, last]) in _NAMES and _named(out, sections) != value:
            _clear(target, sections)
        target[last] = value
    return out


def _place(setting: str) -> int:
    """Where a setting stands among the others: whole sections, names as in `_NAMES`, then the rest."""
    key = setting.partition("=")[0].replace(" ", "")
    if key == "moe":
        return -1
    return _NAMES.index(key) if key in _NAMES else len(_NAMES)


def _named(table: Mapping[str, Any], sections: list[str]) -> Any:
    """The name in a section of [init] or a router; a decoder without one has the encoder's."""
    first, *rest = sections
    default = {"init": "copy", "router": "top_k"}.get(first) if not rest else _named(table, rest)
    for section in sections:
        table = _table(table.get(section, {}), section)
    return table.get("name", default)


def _of_every_router() -> set[str]:
    """The keys of [router] that mean the same in all routers."""
    from upcycle.nn import routers

    return {f.name for f in dataclasses.fields(routers.Router)} - {"group"}


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UpcycleError(f"[{where}] must be a section with keys, not {shown(value)}")
    return value


def read(
    cls: type,
    table: Mapping[str, Any],
    where: str,
    made: Mapping[str, Any] | None = None,
    beside: Mapping[str, type | None] | None = None,
) -> Any:
    """An instance of the dataclass `cls` from `table`.

    `made` holds fields that are ready; `beside` names the sections that they were read from, with their
    dataclasses.
    """
    made, beside = made or {}, beside or {}
    hints = get_type_hints(cls, localns={"Init": object, "Router": object, "Task": object})
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in made}
    prefix = f"{where}." if where else ""
    for key in table:
        if key not in fields:
            sections = {n: hints[n] for n in fields if dataclasses.is_dataclass(hints[n])} | dict(beside)
            raise UpcycleError(
                f"unknown key {cut(prefix + str(key))}{_known(key, [*fields, *beside], sections)}"
            )
    values = dict(made)
    for name, field in fields.items():
        if name not in table:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise UpcycleError(f"{prefix}{name} is missing; it has no default")
            continue
        hint = hints[name]
        item = next(iter(get_args(hint)), None) if get_origin(hint) is tuple else None
        if dataclasses.is_dataclass(hint):
            values[name] = read(hint, _table(table[name], name), name)  # type: ignore[arg-type]
        elif dataclasses.is_dataclass(item):
            values[name] = _tables(item, table[name], prefix + name)  # type: ignore[arg-type]
        else:
            values[name] = _value(table[name], hint, prefix + name)
    return cls(**values)


def _known(key: object, known: list[str], sections: Mapping[str, Any]) -> str:
    """The end of an error about an unknown key: where it belongs, and what there is."""
    for name, section in sections.items():
        if section is not None and key in {f.name for f in dataclasses.fields(section)}:
            return f"; did you mean {name}.{key}? Known: {', '.join(sorted(known))}"
    if key == "base":
        return "; a file names its base itself, at its top"
    return nearest(key, known)


def _tables(cls: type, value: Any, where: str) -> tuple[Any, ...]:
    """A list of tables, as `[[data.sources]]` makes it."""
    if not isinstance(value, (list, tuple)):
        raise UpcycleError(f"[[{where}]] must be a list of sections, not {shown(value)}")
    return tuple(read(cls, _table(t, where), f"{where}[{i}]") for i, t in enumerate(value))


def _value(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`, or an error that says what is allowed."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if get_origin(option) is Literal and value in get_args(option) and not isinstance(value, bool):
            return value
        if option in (int, str, bool) and type(value) is option and _sane(value, where):
            return value
        if option is float and type(value) in (int, float) and _sane(value, where):
            return float(value)
        if option is str and isinstance(value, Path):
            return str(value)
        if get_origin(option) is tuple and isinstance(value, (list, tuple)):
            item = get_args(option)[0]
            if item is float and all(type(v) in (int, float) and _sane(v, where) for v in value):
                return tuple(map(float, value))
            if all(type(v) is item and _sane(v, where) for v in value):
                return tuple(value)
    allowed = " or ".join(_allowed(option) for option in options if option is not type(None))
    raise UpcycleError(f"{where} = {shown(value)}; allowed: {allowed}")


def _sane(value: Any, where: str) -> bool:
    """True; an error for a whole number of more than 64 bits, and for a NUL in a path or a name."""
    if isinstance(value, str) and "\0" in value and not where.endswith("separator"):
        raise UpcycleError(f"{where} = {shown(value)} holds a NUL character, which no path and no name has")
    if isinstance(value, int) and abs(value) >= 1 << 64:
        raise UpcycleError(f"{where} is a whole number of more than 64 bits; give a smaller one")
    return True


def _allowed(option: Any) -> str:
    if get_origin(option) is Literal:
        return ", ".join(get_args(option))
    if get_origin(option) is tuple:
        return f"a list of {_allowed(get_args(option)[0]).removeprefix('a ')}s"
    return {int: "whole number", float: "a number", str: "string", bool: "true or false"}[option]


def nearest(given: object, known: Iterable[str]) -> str:
    """`; did you mean ...? Known: ...`, the end of an error about an unknown name."""
    known = sorted(known)
    close = difflib.get_close_matches(str(given), known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ";"
    return f"{hint} Known: {', '.join(known) or 'none'}"
