"""`upcycle keys`: every key of a recipe and of a run file, made from the dataclasses that read them.

The sentence of a key is the comment beside its field or above it, so that the page says what the code says.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from upcycle import init, recipe
from upcycle.nn import routers

TITLE = "Keys of recipes and run files"
ABOUT = """
A recipe (`--recipe FILE.toml`) has `seed`, `dtype`, `[moe]`, `[init]`, `[router]`, `[successor]` and the
tables of stacks; a run file (`upcycle train`) has those and the rest. `--set KEY=VALUE` goes over a file.
`base = FILE`, at the top of a file, lays it over another one; `moe = false` takes that one's experts away.
`[decoder.moe]` and `[decoder.router]` of an encoder-decoder, and `[stage_1.moe]` to `[stage_4.router]` of a
ConvNeXt, hold what that stack of blocks has otherwise. Capacity for all tokens, of a router that has a
capacity, is `capacity_factor = num_experts`.
""".strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """One key: as it is written, what it takes, what holds where it is left out, and what it is."""

    name: str
    takes: str
    default: str
    sentence: str


def everything() -> dict[str, list[Key]]:
    """The keys by section."""
    from upcycle import tasks
    from upcycle.data import augment, corpus, documents
    from upcycle.training import optimizers, run, schedules

    made = "recipe", "task", "init", "router", "parts", "moe", "successor"
    tables = "data", "train", "schedule", "optimizer", "parallel", "log", "checkpoint"
    out = {
        "of a run file": of(run.Run, without=(*made, *tables)),
        "of a recipe": of(recipe.Recipe, without=made),
        "[moe]": of(recipe.Moe),
        **{f'[init] name = "{name}"': of(init.find(name)) for name in init.names()},
        **{f'[router] name = "{name}"': of(routers.find(name)) for name in routers.names()},
        "[router], in a run file": of(run.Balance),
        "[successor]": of(recipe.Successor),
        **{f'[task] name = "{name}"': of(tasks.find(name)) for name in tasks.names()},
        "[task.augment]": of(augment.Augment),
        "[data]": of(corpus.Data, without=("sources",)),
        "[[data.sources]]": of(documents.Source),
        "[train]": of(run.Train),
        **{f'[schedule] name = "{name}"': of(schedules.find(name)) for name in schedules.names()},
        **{f'[optimizer] name = "{name}"': of(optimizers.find(name)) for name in optimizers.names()},
        "[parallel]": of(run.Parallel),
        "[log]": of(run.Log),
        "[checkpoint]": of(run.Saving),
    }
    return {section: keys for section, keys in out.items() if keys}


def of(cls: type[Any], without: tuple[str, ...] = ()) -> list[Key]:
    """The keys that a dataclass reads."""
    unread = {"Init": object, "Router": object, "Task": object}
    hints = get_type_hints(cls, localns=unread)
    return [
        Key(
            name=field.name,
            takes=_takes(hints[field.name]),
            default=_default(field),
            sentence=_sentence(cls, field.name),
        )
        for field in dataclasses.fields(cls)
        if field.name not in without
    ]


def markdown() -> str:
    """docs/keys.md."""
    parts = [f"# {TITLE}", ABOUT]
    for section, keys in everything().items():
        rows = [(f"`{k.name}`", k.takes, k.default, k.sentence) for k in keys]
        table = [("key", "takes", "default", ""), ("---",) * 4, *rows]
        lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table)
        parts += [f"## {section}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def as_dict() -> dict[str, list[dict[str, str]]]:
    """The same as JSON has it."""
    return {section: [dataclasses.asdict(key) for key in keys] for section, keys in everything().items()}


def _takes(hint: Any) -> str:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return " or ".join(_one(option) for option in options if option is not type(None))


def _one(option: Any) -> str:
    if get_origin(option) is Literal:
        return ", ".join(map(str, get_args(option)))
    if get_origin(option) is tuple:
        return f"a list: {_one(get_args(option)[0])}"
    if dataclasses.is_dataclass(option):
        return "a table"
    return {int: "whole number", float: "number", str: "text", bool: "true, false"}[option]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return "none"
    if dataclasses.is_dataclass(field.default):
        return "that table's own"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    if isinstance(field.default, tuple):
        return f"[{', '.join(map(str, field.default))}]"
    return str(field.default) if field.default != "" else "none"


def _sentence(cls: type[Any], name: str) -> str:
    """What is said beside the field, by the nearest class that says something."""
    for owner in cls.__mro__:
        if name in inspect.get_annotations(owner) and (said := _comments(owner).get(name)):
            return said.replace("None", "none")
    return ""


def _comments(cls: type[Any]) -> dict[str, str]:
    """The comments beside the fields of a class and above them, by field."""
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
