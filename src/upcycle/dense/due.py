"""The stored tensors beside those that are due by config.json: missing ones, other shapes, a surplus."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle.checkpoints import mistaken
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.header import TensorInfo
from upcycle.dense import towers
from upcycle.dense.leaving_out import without
from upcycle.dense.places import Place
from upcycle.errors import UpcycleError, listed, shown
from upcycle.families import Config, Family


def check(
    checkpoint: Checkpoint, stored: Mapping[str, TensorInfo], family: Family, config: Config, place: Place
) -> dict[str, str]:
    """Compare the headers with what the config promises; return the tensors that may be left out, and why."""
    mine = {name: own for name in stored if (own := place.own(name)) is not None}
    found = {own: stored[name] for name, own in mine.items()}
    where, expected = checkpoint.folder, place.shapes(family, config)
    expected |= {n: weight.shape for n, weight in family.optional(config).items() if n in found}
    expected |= {name: info.shape for name, info in found.items() if family.unlisted(config, name)}
    for name in family.may_lack(config) - found.keys():
        del expected[name]
    left_out = {}
    surplus = []
    for name in stored:
        own = mine.get(name)
        if own in expected:
            continue
        if (reason := _spared(family, config, place, name, own)) is not None:
            left_out[name] = reason
        elif own is not None:
            surplus.append(name)
    if surplus and (said := mistaken.heads(surplus)):
        raise UpcycleError(f"{where}: {said}, or {without(checkpoint, 'these tensors')}")
    refuse_other_shapes(where, expected, {name: (info.name, info.shape) for name, info in found.items()})
    refuse_surplus(checkpoint, surplus, family.model_type)
    return left_out


def check_around(checkpoint: Checkpoint, stored: Mapping[str, TensorInfo], place: Place) -> None:
    """Refuse a value head around a text model, and a tower that is not what its config says.

    A tower must have its blocks; one of a known family, also what comes before them, and the shapes of its
    config. What no image need pass through may be missing (`towers.missing`). All else around the text model
    is taken as it is: no family knows the class of the whole model.
    """
    raw, where = checkpoint.config, checkpoint.folder
    around = [name for name in stored if place.own(name) is None]
    if said := mistaken.beside(around):
        raise UpcycleError(f"{where}: {said}, or {without(checkpoint, 'these tensors')}")
    lacks, _ = towers.missing(raw, around)
    if lacks:
        raise UpcycleError(
            f"{where} lacks {listed(lacks)}, which its config.json calls for; give the checkpoint with "
            f"all that stands around its text model, or take the text model out of it (moe.part_only = text)"
        )
    if (known := towers.Known.of(raw, len(around))) is None:
        return
    for names in known.spelled(around):
        found = {own: stored[name] for name in around if (own := names.own(name)) is not None}
        there = {name: shape for name, shape in known.expected.items() if name in found}
        refuse_other_shapes(where, there, {name: (info.name, info.shape) for name, info in found.items()})


def check_beside(
    stored: Mapping[str, TensorInfo], where: Path, family: Family, config: Config, place: Place
) -> None:
    """Refuse a text model that is not whole, where its vision tower alone gets experts.

    It stays as it is, with whatever else is stored in it.
    """
    found = {own: info for name, info in stored.items() if (own := place.own(name)) is not None}
    lackable = family.may_lack(config) - found.keys()
    expected = {name: shape for name, shape in place.shapes(family, config).items() if name not in lackable}
    refuse_other_shapes(where, expected, {name: (info.name, info.shape) for name, info in found.items()})


def refuse_more_blocks(where: Path, tensors: int, family: Family, own: Mapping[str, Any]) -> None:
    """Refuse a config with more blocks than there are tensors, before the blocks are enumerated.

    Every block has tensors of its own.
    """
    for key in family.counts:
        count = own.get(key)
        if isinstance(count, int) and count > tensors:
            raise UpcycleError(
                f"{where}/config.json: {key} = {shown(count)}, and its files hold only {tensors} "
                f"tensors; give the config that belongs to these weights"
            )


def refuse_other_shapes(
    where: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Refuse tensors that are missing, empty, or not of the shape that config.json says.

    `found` has the name on disk and the shape of each tensor, by the name that `expected` has.
    """
    if missing := [name for name in expected if name not in found]:
        raise UpcycleError(f"{where} lacks {listed(missing)}, which its config.json calls for")
    if said := mistaken.empty({name: found[name][1] for name in expected}):
        raise UpcycleError(f"{where}: {said}")
    for name, shape in expected.items():
        stored, own = found[name]
        if own != shape:
            raise UpcycleError(f"{where}: {stored} has shape {list(own)} and config.json says {list(shape)}")


def refuse_surplus(checkpoint: Checkpoint, surplus: list[str], model_type: str) -> None:
    """Refuse tensors that a model of this config does not have."""
    if surplus:
        raise UpcycleError(
            f"{checkpoint.folder} holds {listed(surplus)}, which a {model_type} of this config does not "
            f"have; nothing is dropped in silence, so {without(checkpoint, 'them')}"
        )


def _spared(family: Family, config: Config, place: Place, name: str, own: str | None) -> str | None:
    """Return why a stored tensor that the model does not have may be left out, or None if it may not."""
    if own is None:
        return place.set_aside(name) or family.ignored(name)
    if family.tied and own == family.tied[0] and config["tie_word_embeddings"]:
        return f"tied to {family.tied[1]} by the config"
    return family.ignored(own)
