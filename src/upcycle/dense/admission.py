"""A checkpoint is admitted as a dense model of a known family, or refused with the reason."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from upcycle import families, targets
from upcycle.checkpoints import mistaken
from upcycle.checkpoints.checkpoint import CHUNK, Checkpoint
from upcycle.checkpoints.dtypes import COUNTERS, FLOATS
from upcycle.checkpoints.header import TensorInfo
from upcycle.dense import places
from upcycle.dense.places import Place
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError, cut, listed, nearest_of_many, shown
from upcycle.families import Config, Family
from upcycle.families._names import Names, spelled
from upcycle.families._wrappers import TEXT, VISION, Wrapper, config_key
from upcycle.targets import natives
from upcycle.targets.wrapped import Wrapped

_DROPPED = "the recipe drops "  # the beginning of a reason; the pattern of the recipe follows
_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_MOE_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


def admit(
    checkpoint: Checkpoint, *, alone: bool = False, part: str = TEXT, drop: tuple[str, ...] = ()
) -> Dense:
    """Return the dense model in a checkpoint; that of a multimodal one is its text model.

    `alone` takes that out of the model around it, and `part` can be its vision tower instead. `drop` has
    names and patterns of stored tensors to leave out. Raises `UpcycleError`, with the reason, for anything
    that is not exactly a dense model of a known family.
    """
    raw, where = checkpoint.config, checkpoint.folder
    within = places.is_wrapper(raw)
    if part == VISION:
        return _admit_tower(checkpoint, within=within, drop=drop)
    own = places.own_config(raw) if within else raw
    _refuse_moe(checkpoint, own)
    refuse_quantised(checkpoint)
    family = _family(checkpoint, own, within=within)
    if alone and family.alone:
        family = families.find(family.alone)
    without = dropped(checkpoint, drop)
    stored = kept(checkpoint, without)
    refuse_unsound(checkpoint, stored, family, own)
    place: Place
    if within:
        place = _within(checkpoint, stored, family, own, alone=alone)
    elif alone:
        raise UpcycleError(
            f"moe.part_only takes a text model out of a multimodal one, and {where} ({own['model_type']}) "
            f"has nothing around it; take it out of the recipe"
        )
    else:
        place = _at_top(checkpoint, stored, family, own)
    config = family.config(place.config(raw))
    left_out = without | _check_tensors(checkpoint, stored, family, config, place)
    if within and not alone:
        _check_around(
            checkpoint, {name: info for name, info in stored.items() if name not in left_out}, place
        )
    return Dense(checkpoint=checkpoint, family=family, config=config, left_out=left_out, place=place)


def _check_around(checkpoint: Checkpoint, stored: Mapping[str, TensorInfo], place: Place) -> None:
    """Refuse a value head around a text model, and a vision tower of other shapes than its config has.

    All else around it is taken as it is: no family knows the class of the whole model. A tower is compared if
    it is of a known family and all its names are there, because a model may do without its last blocks.
    """
    raw = checkpoint.config
    around = [name for name in stored if place.own(name) is None]
    if said := mistaken.beside(around):
        raise UpcycleError(f"{checkpoint.folder}: {said}, or {_without(checkpoint, 'these tensors')}")
    wrapper = places.wrapper_of(raw)
    if wrapper is None or not wrapper.vision or not isinstance(raw.get(config_key(VISION)), Mapping):
        return
    own = places.own_config(raw, VISION)
    if own["model_type"] not in families.names() or not families.find(own["model_type"]).sees:
        return
    family = families.find(own["model_type"])
    tower = places.Tower(model_type=str(raw["model_type"]), wrapper=wrapper, text=None)
    try:
        _refuse_more_blocks_than_tensors(checkpoint.folder, len(around), family, own)
        expected = family.shapes(family.config(tower.config(raw)))
    except UpcycleError:  # it stays as it is, so that it need not be one that could have experts
        return
    for names in spelled(family, expected, around):
        found = {known: stored[name] for name in around if (known := names.own(name)) is not None}
        there = {name: shape for name, shape in expected.items() if name in found}
        refuse_other_shapes(
            checkpoint.folder, there, {name: (info.name, info.shape) for name, info in found.items()}
        )


def _admit_tower(checkpoint: Checkpoint, *, within: bool, drop: tuple[str, ...]) -> Dense:
    """Return the vision tower of a multimodal model."""
    raw, where, outer = checkpoint.config, checkpoint.folder, cut(str(checkpoint.config.get("model_type")))
    if not within:
        raise UpcycleError(
            f"moe.part = vision is for a multimodal model, and {where} ({outer}) has no vision tower of its "
            f"own; take it out of the recipe"
        )
    own = places.own_config(raw, VISION)
    wrapper = places.wrapper_of(raw)
    named = own.get("model_type", "of its own")
    known = named in families.names() and families.find(str(named)).sees
    if wrapper is None or not wrapper.vision or not known:
        sees = [name for name in families.names() if families.find(name).sees]
        why = f"it must be one of {', '.join(sees)}" if wrapper and wrapper.vision else "its class is fixed"
        raise UpcycleError(
            f"{where} is a {outer} around a vision tower ({shown(named)}) that cannot have experts: {why}; "
            f"moe.part = text gives them to the text model"
        )
    _refuse_moe(checkpoint, own)
    family = families.find(str(named))
    without = dropped(checkpoint, drop)
    stored = kept(checkpoint, without)
    refuse_unsound(checkpoint, stored, family, own)
    place = places.Tower(model_type=outer, wrapper=wrapper, text=Wrapped.found(raw))
    config = family.config(place.config(raw))
    found = spelled(family, family.shapes(config), stored)
    places.refuse_two(where, found, VISION)
    place = replace(place, names=found[0] if found else Names())
    left_out = without | _check_tensors(checkpoint, stored, family, config, place)
    return Dense(checkpoint=checkpoint, family=family, config=config, left_out=left_out, place=place)


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse a config.json that says that the weights are quantised."""
    if (method := checkpoint.config.get("quantization_config")) is not None:
        name = method.get("quant_method", "?") if isinstance(method, dict) else "?"
        raise UpcycleError(f"{checkpoint.folder} is quantised ({name}); give the checkpoint it was made from")


def refuse_unsound(
    checkpoint: Checkpoint, stored: Mapping[str, TensorInfo], family: Family, own: Mapping[str, Any]
) -> None:
    """Refuse a checkpoint that is quantised or packed, has too few tensors, or has names of a wrapper.

    `stored` are its tensors without those that are dropped. `own` is the config of the model in it, which is
    of the family `family`.
    """
    refuse_quantised(checkpoint)
    where = checkpoint.folder
    refuse_packed(checkpoint, (n for n, t in stored.items() if _is_odd(t) and family.ignored(n) is None))
    _refuse_more_blocks_than_tensors(where, len(stored), family, own)
    if wrapped := mistaken.names(stored):
        raise UpcycleError(f"{where}: {wrapped}")


def refuse_packed(checkpoint: Checkpoint, odd: Iterable[str]) -> None:
    """Refuse a checkpoint with tensors, of the names in `odd`, that are of no floating-point type."""
    if names := sorted(odd):
        raise UpcycleError(
            f"{checkpoint.folder} holds {listed(names)} as {checkpoint.tensors[names[0]].dtype}: it is "
            f"quantised or packed; give a checkpoint in {', '.join(FLOATS)}"
        )


def _is_odd(tensor: TensorInfo) -> bool:
    """Return whether a tensor is neither of floating-point numbers nor a single counter, as norms keep."""
    return tensor.dtype not in FLOATS and (tensor.dtype not in COUNTERS or tensor.shape != ())


def _refuse_moe(checkpoint: Checkpoint, own: Mapping[str, Any]) -> None:
    """Refuse a model that has experts; `own` is its config, within that of the checkpoint or all of it."""
    if not has_experts(own):
        return
    grow = ", or add a section [grow] to a recipe, which makes more experts of those that are there"
    raise UpcycleError(
        f"{checkpoint.folder} is already a Mixture of Experts ({own.get('model_type')}); give a dense "
        f"checkpoint{grow if checkpoint.config.get('model_type') in natives.growing() else ''}"
    )


def has_experts(own: Mapping[str, Any]) -> bool:
    """Return whether a config is that of a Mixture of Experts."""
    if targets.opened(own) is not None or "moe" in own:
        return True
    # The class of some dense models can have experts, and knows how many it would have.
    return own.get("model_type") not in natives.names() and any(_several(own.get(key)) for key in _MOE_KEYS)


def _several(count: Any) -> bool:
    """Return whether a number of experts is more than one."""
    return isinstance(count, int) and count > 1


def _family(checkpoint: Checkpoint, own: Mapping[str, Any], *, within: bool) -> Family:
    """Return the family of a model's own config."""
    model_type, where = own.get("model_type"), checkpoint.folder
    if not isinstance(model_type, str):
        raise UpcycleError(f"{where}/config.json has no model_type; `upcycle list` prints the known ones")
    if within and model_type not in families.names():
        raise UpcycleError(
            f"{where} is a {shown(checkpoint.config.get('model_type'))} around a text model of type "
            f"{shown(model_type)}, which upcycle does not know"
            f"{nearest_of_many(model_type, families.names(), 'upcycle list')}"
        )
    known = families.by_class(own) or model_type
    return families.find(families.find(known).meant(own))


def _within(
    checkpoint: Checkpoint, stored: Collection[str], family: Family, own: Mapping[str, Any], *, alone: bool
) -> places.Within:
    """Return where the text model stands in a multimodal one."""
    raw = checkpoint.config
    outer = str(raw.get("model_type"))
    wrapper = places.wrapper_of(raw)
    if wrapper is None and not alone:
        raise UpcycleError(
            f"{checkpoint.folder} is a {cut(outer)} around a {family.model_type}, and upcycle does not know "
            f"whether a {cut(outer)} can hold experts; moe.part_only (--part-only text) takes the text model "
            f"out of it"
        )
    found = spelled(family, family.shapes(family.config(own)), stored)
    places.refuse_two(checkpoint.folder, found)
    names = found[0] if found else Names(root=family.root)
    tied = places.head_is_tied(raw, _head_is_stored(family, names, stored))
    kind = places.Alone if alone else places.Within
    return kind(names=names, model_type=outer, wrapper=wrapper or Wrapper(architecture=""), tied=tied)


def _head_is_stored(family: Family, names: Names, stored: Collection[str]) -> bool:
    return family.tied is not None and names.stored(family.tied[0]) in stored


def _at_top(checkpoint: Checkpoint, stored: Collection[str], family: Family, own: Mapping[str, Any]) -> Place:
    """Return where a model stands that is all of its checkpoint: its names, and whether it has a head."""
    config = family.config(own)
    if (body := family.body_class(config, stored)) is not None:
        return places.Body(names=Names(former=family.former), named=body)
    found = spelled(family, family.shapes(config).keys() - family.may_lack(config), stored)
    places.refuse_two(checkpoint.folder, found)
    names = found[0] if found else Names(former=family.former)
    named = (own.get("architectures") or [""])[0]
    untied = not config["tie_word_embeddings"]
    bare = named == family.base_class or (untied and (not names.body or named.endswith(_OTHER_HEADS)))
    if found and family.base_class and bare and not _head_is_stored(family, names, stored):
        return places.WithoutHead(names=names)
    return Place(names=names)


def _refuse_more_blocks_than_tensors(
    where: Path, tensors: int, family: Family, own: Mapping[str, Any]
) -> None:
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


def that_find(checkpoint: Checkpoint, drop: Iterable[str]) -> tuple[str, ...]:
    """Return the names and patterns of `drop` that some stored tensor has."""
    return tuple(pattern for pattern in drop if fnmatch.filter(checkpoint.tensors, pattern))


def dropped(checkpoint: Checkpoint, drop: tuple[str, ...]) -> dict[str, str]:
    """Return the stored tensors that a recipe leaves out. Raises `UpcycleError` if a pattern finds none."""
    found = {pattern: fnmatch.filter(checkpoint.tensors, pattern) for pattern in drop}
    if idle := [pattern for pattern, names in found.items() if not names]:
        raise UpcycleError(f"drop: {checkpoint.folder} holds no tensor called {shown(idle[0])}")
    return {name: _DROPPED + pattern for pattern, names in found.items() for name in names}


def kept(checkpoint: Checkpoint, without: Collection[str]) -> dict[str, TensorInfo]:
    """Return the stored tensors except those of the names in `without`."""
    return {name: info for name, info in checkpoint.tensors.items() if name not in without}


def _check_tensors(
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
        raise UpcycleError(f"{where}: {said}, or {_without(checkpoint, 'these tensors')}")
    refuse_other_shapes(where, expected, {name: (info.name, info.shape) for name, info in found.items()})
    refuse_surplus(checkpoint, surplus, family.model_type)
    return left_out


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
            f"have; nothing is dropped in silence, so {_without(checkpoint, 'them')}"
        )


def _spared(family: Family, config: Config, place: Place, name: str, own: str | None) -> str | None:
    """Return why a stored tensor that the model does not have may be left out, or None if it may not."""
    if own is None:
        return place.set_aside(name) or family.ignored(name)
    if family.tied and own == family.tied[0] and config["tie_word_embeddings"]:
        return f"tied to {family.tied[1]} by the config"
    return family.ignored(own)


def drops_head(dense: Dense) -> bool:
    """Return whether the recipe drops a stored head, so that the embedding takes its place."""
    names = dense.family.tied
    return names is not None and dense.left_out.get(dense.place.names.stored(names[0]), "").startswith(
        _DROPPED
    )


def refuse_two_heads(dense: Dense) -> None:
    """Refuse a config that ties a head although a head with other values is stored, which is ambiguous.

    transformers 5 keeps the two apart if they differ. A head that the recipe drops is not asked about. This
    reads both tensors, and asks nothing about a checkpoint of headers alone.
    """
    opened = dense.checkpoint
    for names in dense.family.twins(dense.config).items():
        head, other = map(dense.place.names.stored, names)
        if dense.left_out.get(head, _DROPPED).startswith(_DROPPED) or opened.headers_only:
            continue
        if not _same(opened, opened.tensors[head], opened.tensors[other]):
            raise UpcycleError(
                f"{opened.folder} stores an {head} that differs from {other}, to which its config ties it; "
                f"set tie_word_embeddings to false in config.json, or {_without(opened, head, head)}"
            )


def _same(opened: Checkpoint, one: TensorInfo, other: TensorInfo) -> bool:
    """Return whether two tensors of a checkpoint are of the same type, shape and bytes."""
    return (one.shape, one.dtype) == (other.shape, other.dtype) and all(
        np.array_equal(opened.pread(one, i, j), opened.pread(other, i, j))
        for i in range(0, one.nbytes, CHUNK)
        for j in (min(one.nbytes, i + CHUNK),)
    )


_DROPPING = {"source": "drop, or --drop {}", "teacher": "teacher.drop"}  # by the role of a checkpoint


def _without(opened: Checkpoint, what: str, name: str = "NAME") -> str:
    """Say how tensors of a checkpoint are left out, which are called `what` in the sentence."""
    if opened.label in _DROPPING:
        return f"leave {what} out ({_DROPPING[opened.label].format(name)})"
    return f"take {what} out of its files"
