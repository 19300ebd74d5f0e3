"""A recipe as the text of a TOML file that `upcycle convert --recipe` reads: comments, then tables."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from upcycle.errors import printable
from upcycle.nn.routers import Router
from upcycle.recipe import Part, Recipe
from upcycle.settings import Settings

WIDTH = 100  # characters of a comment line
SHOWN = ("name", "num_experts", "top_k", "layers", "target")  # keys that are written even at their defaults


def text(recipe: Recipe, comments: Iterable[str]) -> str:
    """Return the TOML text of `recipe` under `comments`, one paragraph each.

    An indented paragraph is a part of a command and stays on one line. A key is written if its value is not
    the default, or if it is one of `SHOWN`. Reading the text gives an equal recipe.
    """
    head = [line for comment in comments for line in _comment(comment)]
    top = {key: getattr(recipe, key) for key in ("seed", "dtype")}
    sections = [_pairs({key: value for key, value in top.items() if value != getattr(Recipe(), key)})]
    sections.append(_section("moe", _changed(recipe.moe)))
    sections.append(_section("init", _changed(recipe.init)))
    sections.append(_section("router", _changed(recipe.router)))
    if recipe.successor is not None:
        sections.append(_section("successor", _changed(recipe.successor)))
    for name, part in recipe.parts.items():
        sections += [_section(f"{name}.{section}", table) for section, table in _own(part, recipe).items()]
    return "\n\n".join("\n".join(section) for section in (head, *sections) if section) + "\n"


def _comment(paragraph: str) -> list[str]:
    plain = printable(paragraph)
    if plain.startswith(" "):
        return [f"# {plain}"]
    return [f"# {line}" for line in textwrap.wrap(plain, WIDTH, break_long_words=False)]


def _section(name: str, table: Mapping[str, Any]) -> list[str]:
    return [f"[{name}]", *_pairs(table)] if table else []


def _pairs(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_value(value)}" for key, value in table.items()]


def _value(value: Any) -> str:
    """Return a value as TOML writes it; its numbers, truth values, strings and lists are those of JSON."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(_pairs(value)) + "}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _changed(settings: Settings) -> dict[str, Any]:
    """Return the keys of `settings` that a file has to say."""
    usual = {field.name: field.default for field in dataclasses.fields(settings)}
    table = settings.as_table()
    return {
        key: value
        for key, value in table.items()
        if key in SHOWN or value != usual.get(key, dataclasses.MISSING)
    }


def _own(part: Part, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the keys by which a stack differs from the model: `moe` and `router`, each if it has any."""
    moe = _beside(part.moe.as_table(), recipe.moe.as_table())
    if part.router.name == recipe.router.name:
        router = _beside(part.router.as_table(), recipe.router.as_table())
    else:  # keys of the model's router that are common to all routers hold for this stack as well
        inherited = {key: value for key, value in part.router.as_table().items() if key in Router.common}
        router = {**_changed(part.router), **inherited}
    return {"moe": moe, "router": router}


def _beside(own: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in own.items() if model.get(key) != value}
