"""`upcycle keys`: the reference of all keys of a recipe and a run file, made from their dataclasses.

The sentence on a key is the comment beside its field or above it, so that it always agrees with the code.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import re
import textwrap
import tokenize
from typing import Any, Literal, get_args, get_origin

from upcycle import settings
from upcycle.nn.balance import Balance
from upcycle.recipe import Recipe
from upcycle.training.run import Run
from upcycle.training.stages import Stage, StageTrain

TITLE = "Keys of recipes and run files"
ABOUT = """
A recipe (`--recipe FILE.toml`) has `seed`, `dtype`, `drop`, `[moe]`, `[init]`, `[router]`, `[successor]`,
`[grow]` and the tables of stacks; a run file (`upcycle train`) has those and the rest. `--set KEY=VALUE`
goes over a file. `base = FILE`, at the top of a file, lays it over another one; `moe = false` takes that
one's experts away.
`[decoder.moe]` and `[decoder.router]` of an encoder-decoder, and `[stage_1.moe]` to `[stage_4.router]` of a
ConvNeXt, hold what that stack of blocks has otherwise. Capacity for all tokens, of a router that has a
capacity, is `capacity_factor = num_experts`. A `[[stage]]` of a run has `[stage.train]` and, with the keys
that differ from the run's, `[stage.data]`, `[stage.schedule]` and `[stage.router]`.
""".strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """A key: how it is written, its values, its default and its meaning."""

    name: str
    takes: str
    default: str
    sentence: str


def everything() -> dict[str, list[Key]]:
    """Return the keys of runs and recipes by section."""
    out = {
        "of a run file": _plain(Run),
        "of a recipe": _plain(Recipe),
        **_tables(Recipe, ""),
        "[router], in a run file": of(Balance),
        **_tables(Run, "", without=("recipe", "router", "stage")),
        "[[stage]]": of(Stage),
        "[stage.train]": of(StageTrain),
    }
    return {section: keys for section, keys in out.items() if keys}


def of(cls: type[Any]) -> list[Key]:
    """Return the keys of a table, without lists of tables."""
    return [
        Key(
            name=field.name,
            takes=_takes(hint),
            default=_default(field),
            sentence=_sentence(cls, field.name),
        )
        for field in dataclasses.fields(cls)
        if _is_one(hint := settings.hints(cls)[field.name])
    ]


def _plain(cls: type[Any]) -> list[Key]:
    """Return the keys of a file that are not tables."""
    return [key for key in of(cls) if key.takes != "a table"]


def _is_one(hint: Any) -> bool:
    """Return whether a field is a single key or table, not a list of tables."""
    items = (item for option in settings.options(hint) for item in get_args(option))
    return not any(dataclasses.is_dataclass(item) for item in items)


def _tables(cls: type[Any], at: str, without: tuple[str, ...] = ()) -> dict[str, list[Key]]:
    """Return the tables among the fields of a table at `at`, and their inner tables."""
    out: dict[str, list[Key]] = {}
    for name, hint in settings.hints(cls).items():
        place = f"{at}.{name}" if at else name
        for option in settings.options(hint) if name not in without else ():
            if get_origin(option) is tuple and dataclasses.is_dataclass(item := get_args(option)[0]):
                out |= _table(item, f"[[{place}]]", place)
            elif dataclasses.is_dataclass(option):
                out |= _table(option, f"[{place}]", place)
    return out


def _table(cls: Any, title: str, place: str) -> dict[str, list[Key]]:
    """Return a table and its inner tables; for a family of tables, one entry for each member."""
    if not (issubclass(cls, settings.Named) and cls.is_family()):
        return {title: of(cls), **_tables(cls, place)}
    found = {name: cls.find(name) for name in cls.names()}
    out = {f'{title} name = "{name}"': of(kind) for name, kind in found.items()}
    for kind in found.values():
        out |= _tables(kind, place)
    return out


def markdown() -> str:
    """Return the text of docs/keys.md."""
    parts = [f"# {TITLE}", ABOUT]
    for section, keys in everything().items():
        rows = [(f"`{k.name}`", k.takes, k.default, k.sentence) for k in keys]
        table = [("key", "takes", "default", ""), ("---",) * 4, *rows]
        lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table)
        parts += [f"## {section}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def as_dict() -> dict[str, list[dict[str, str]]]:
    """Return the keys as JSON."""
    return {section: [dataclasses.asdict(key) for key in keys] for section, keys in everything().items()}


def _takes(hint: Any) -> str:
    """Describe the values that a key accepts, with their range."""
    kinds = {_one(o): own for o, own in settings.alternatives(hint) if o is not type(None)}
    ranges = {kind: " and ".join(one.text() for one in own) for kind, own in kinds.items()}
    if len(ranges) == 1:
        return ", ".join(text for kind in ranges.items() for text in kind if text)
    return " or ".join(f"{kind} ({text})" if text else kind for kind, text in ranges.items())


def _one(option: Any) -> str:
    if get_origin(option) is Literal:
        return ", ".join(str(each) or '""' for each in get_args(option))
    if get_origin(option) is tuple:
        return f"a list: {_takes(get_args(option)[0])}"
    if dataclasses.is_dataclass(option):
        return "a table"
    return {int: "whole number", float: "number", str: "text", bool: "true, false"}[option]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "that table's own"
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return "none"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    if isinstance(field.default, tuple):
        return f"[{', '.join(map(str, field.default))}]"
    return str(field.default) if field.default != "" else "none"


def _sentence(cls: type[Any], name: str) -> str:
    """Return the comment on the field from the nearest class that has one."""
    for owner in cls.__mro__:
        if name in inspect.get_annotations(owner) and (said := _comments(owner).get(name)):
            return said.replace("None", "none")
    return ""


@functools.cache
def _comments(cls: type[Any]) -> dict[str, str]:
    """Return the comments beside and above the fields of a class, by field."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    comments: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            said = re.sub(r"^#\s*(type: ignore\S*|noqa\S*|fmt: \S*)?", "", token.string).strip()
            comments[token.start[0]] = said.removeprefix("# ")
    out = {}
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in comments and lines[first - 2].lstrip().startswith("#"):
                first -= 1
            within = range(first, (node.end_lineno or first) + 1)
            out[node.target.id] = " ".join(comments[n] for n in within if comments.get(n))
    return out
