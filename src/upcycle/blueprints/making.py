"""How a blueprint is made: source and recipe are admitted, and the target says what every tensor becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from upcycle import targets
from upcycle.blueprints import further, heads, spared, stored_types
from upcycle.blueprints.blueprint import Blueprint
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.hub import Opener, open_checkpoint
from upcycle.dense import mixtures, successors
from upcycle.dense.admission import admit
from upcycle.dense.donors import admit_donors
from upcycle.errors import UpcycleError
from upcycle.families._wrappers import TEXT, VISION, config_key
from upcycle.init._from_statistics import FromStatistics
from upcycle.recipe import Moe, Recipe, RecipeLike
from upcycle.targets import _growing
from upcycle.tensors.entries import Entry

T = TypeVar("T")


def blueprint(
    source: str | Path | Checkpoint,
    recipe: RecipeLike = None,
    *,
    allow_nonfinite: bool = False,
    opener: Opener = open_checkpoint,
) -> Blueprint:
    """Return the blueprint of the MoE that `recipe` makes of the checkpoint `source`.

    That is dense, or a Mixture of Experts if the recipe has a section [grow]. `source` is a folder or a hub
    id; `recipe` is a `Recipe`, its table, or its file. Only headers are read. `opener` opens the source and
    every other checkpoint that the recipe names: `open_checkpoint` downloads that of a hub id, and `peek`
    fetches its headers alone, which is enough unless weights are read. Raises `UpcycleError` if source
    and recipe do not fit.
    """
    recipe = Recipe.of(recipe)
    if not isinstance(source, Checkpoint):
        source = opener(source, allow_nonfinite=allow_nonfinite)
    if recipe.moe.part != TEXT:
        _refuse_for_towers(recipe)
    if recipe.moe.part == TEXT:
        return _of_part(source, recipe, opener, allow_nonfinite=allow_nonfinite)
    tower = _of_part(source, recipe.of_part(VISION), opener, allow_nonfinite=allow_nonfinite)
    if recipe.moe.part == VISION:
        return replace(tower, recipe=recipe)
    text = _of_part(source, recipe.of_part(TEXT), opener, allow_nonfinite=allow_nonfinite)
    return _together(text, tower, recipe)


def _refuse_for_towers(recipe: Recipe) -> None:
    """Refuse what only a text model can have."""
    if recipe.grow is not None or recipe.successor is not None:
        section = "grow" if recipe.grow is not None else "successor"
        raise UpcycleError(
            f"[{section}] is about a text model, and moe.part = {recipe.moe.part} about a vision tower; take "
            f"one of them out"
        )
    target = recipe.moe.target
    usual = target in (Moe.target, "upcycled")
    if not usual and (recipe.moe.part == VISION or not targets.recorded(recipe.moe.as_table()).has_experts):
        raise UpcycleError(
            f"moe.target = {target} is about a text model, and a vision tower becomes an upcycled one; set "
            f"moe.part = text, or leave moe.target out"
        )
    start = recipe.at(VISION).router.start
    measured = isinstance(recipe.init, FromStatistics)
    if measured or start.from_data:
        what = f"init {recipe.init.name}" if measured else f"router.init = {start.name}"
        raise UpcycleError(
            f"{what} is made of what `upcycle calibrate` measures, and it measures no vision tower; "
            f"take another one for moe.part = {recipe.moe.part}, or set moe.part = text"
        )
    if recipe.moe.part != VISION and recipe.init.donors:
        raise UpcycleError(
            f"init {recipe.init.name} takes other checkpoints for one part of a multimodal model; convert "
            f"with moe.part = text, and what that makes with moe.part = vision"
        )


def _together(text: Blueprint, tower: Blueprint, recipe: Recipe) -> Blueprint:
    """Return the blueprint of a multimodal model whose text model and vision tower both get experts."""
    around = {name: entry for name, entry in text.entries.items() if tower.dense.place.own(name) is None}
    key = config_key(VISION)
    return replace(
        text,
        recipe=recipe,
        tower=tower,
        config={**text.config, key: tower.config[key]},
        entries=_in_order({**around, **tower.own_entries}),
    )


def _of_part(source: Checkpoint, recipe: Recipe, opener: Opener, *, allow_nonfinite: bool) -> Blueprint:
    """Return the blueprint for a model that is all of its checkpoint, or one part of it."""
    if recipe.grow is None:
        alone = recipe.moe.part_only == TEXT
        dense = admit(source, alone=alone, part=recipe.moe.part, drop=recipe.drop)
        dense = further.admitted(dense, recipe)
    else:
        dense = mixture = mixtures.admit(source, drop=recipe.drop)
        recipe = _growing.resolved(recipe, mixture)
    recipe.init.admit(dense)
    for router in [recipe.router, *(part.router for part in recipe.parts.values())]:
        router.start.admit(dense)
    if recipe.successor is not None:
        dense = successors.narrowed(dense, recipe, allow_nonfinite=allow_nonfinite, opener=opener)
    target = targets.of(dense, recipe)
    donors = admit_donors(dense, recipe, allow_nonfinite=allow_nonfinite, opener=opener)
    sites = target.sites(dense, recipe)
    config = target.config(dense, recipe, sites)
    config, lazies = heads.untied(
        dense, recipe, config, target.tensors([dense, *donors.models], recipe, sites)
    )
    config, lazies = further.added(dense, recipe, target, sites, config, lazies)
    types = stored_types.of(lazies, recipe.dtype)
    entries = {name: Entry(lazy, types[name]) for name, lazy in _in_order(lazies).items()}
    stored = stored_types.usual(entry.dtype for entry in entries.values())
    built = Blueprint(
        dense=dense,
        donors=donors.models,
        recipe=recipe,
        target=target,
        config={**config, "dtype": stored, "torch_dtype": stored},
        entries=entries,
        sites=sites,
        remarks=donors.remarks,
    )
    for place in range(1, len(built.donors) + 1):
        spared.lost_changes(built, place)  # refuses an adapter of which nothing is left
    return built


def _in_order(tensors: Mapping[str, T]) -> dict[str, T]:
    """Sort tensors: embeddings, then layer by layer, then the rest, so that related tensors lie together."""

    def place(name: str) -> tuple[int, list[tuple[int, str]]]:
        parts = [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]
        number = next((n for n, _ in parts if n >= 0), None)
        if number is not None:
            return number + (1 << 20) * name.startswith("decoder."), parts
        return (-1 if "embed" in name or name == "shared.weight" else 1 << 30), parts

    return {name: tensors[name] for name in sorted(tensors, key=place)}
