"""A recipe as the text of a TOML file that `upcycle convert --recipe` reads: comments, then tables."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from upcycle.errors import printable
from upcycle.nn.routers import Router
from upcycle.recipe import Part, Recipe
from upcycle.settings import Settings, writing

WIDTH = 100  # characters of a comment line
SHOWN = ("name", "num_experts", "top_k", "layers", "target")  # keys that are written even at their defaults


def text(recipe: Recipe, comments: Iterable[str]) -> str:
    """Return the TOML text of `recipe` under `comments`, one paragraph each.

    An indented paragraph is a part of a command and stays on one line. A key is written if its value is not
    the default, or if it is one of `SHOWN`. Reading the text gives an equal recipe.
    """
    head = [line for comment in comments for line in _comment(comment)]
    top = {key: getattr(recipe, key) for key in ("seed", "dtype", "drop")}
    table = {key: value for key, value in top.items() if value != getattr(Recipe(), key)}
    sections = {name: getattr(recipe, name) for name in ("moe", "init", "router", "successor", "grow")}
    table |= {name: _said(section) for name, section in sections.items() if section is not None}
    table |= {name: _own(part, recipe) for name, part in recipe.parts.items()}
    return writing.text(table, head)


def _comment(paragraph: str) -> list[str]:
    plain = printable(paragraph)
    if plain.startswith(" "):
        return [f"# {plain}"]
    return [f"# {line}" for line in textwrap.wrap(plain, WIDTH, break_long_words=False)]


def _said(section: Settings) -> dict[str, Any]:
    """Return the keys of a section that a file has to say: its first key at least, so that the section is
    there."""
    table = section.as_table()
    first = next(iter(table))
    return _changed(section) or {first: table[first]}


def _changed(settings: Settings) -> dict[str, Any]:
    """Return the keys of `settings` that a file has to say."""
    usual = {field.name: field.default for field in dataclasses.fields(settings)}
    table = settings.as_table()
    changed = {
        key: value
        for key, value in table.items()
        if key in SHOWN or value != usual.get(key, dataclasses.MISSING)
    }
    return changed | {key: found for key in changed if (found := _items(getattr(settings, key, None)))}


def _items(value: Any) -> list[dict[str, Any]]:
    """Return the tables of a list of tables, with the keys that a file has to say; empty for other values."""
    tables = isinstance(value, tuple) and all(isinstance(each, Settings) for each in value)
    return [_changed(each) for each in value] if tables else []


def _own(part: Part, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the keys by which a stack differs from the model; a key of `moe` if it does not differ."""
    moe = _beside(part.moe.as_table(), recipe.moe.as_table())
    if part.router.name == recipe.router.name:
        router = _beside(part.router.as_table(), recipe.router.as_table())
    else:  # keys of the model's router that are common to all routers hold for this stack as well
        inherited = {key: value for key, value in part.router.as_table().items() if key in Router.common}
        router = {**_changed(part.router), **inherited}
    if not moe and not router:
        moe = {"num_experts": part.moe.num_experts}
    return {"moe": moe, "router": router}


def _beside(own: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in own.items() if model.get(key) != value}
