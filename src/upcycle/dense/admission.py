"""A checkpoint is admitted as a dense model of a known family, or refused with the reason."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from upcycle import families, targets
from upcycle.checkpoints import mistaken
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.dtypes import COUNTERS, FLOATS
from upcycle.checkpoints.header import TensorInfo
from upcycle.dense import due, places
from upcycle.dense.leaving_out import dropped, kept
from upcycle.dense.places import Place
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError, cut, listed, nearest_of_many, shown
from upcycle.families import Config, Family
from upcycle.families._names import Names, spelled
from upcycle.families._wrappers import TEXT, VISION, Wrapper
from upcycle.targets import natives
from upcycle.targets.wrapped import Wrapped

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
    left_out = without | due.check(checkpoint, stored, family, config, place)
    if within and not alone:
        due.check_around(
            checkpoint, {name: info for name, info in stored.items() if name not in left_out}, place
        )
    return Dense(checkpoint=checkpoint, family=family, config=config, left_out=left_out, place=place)


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
    place = replace(place, names=found[0] if found else _of_some(family, config, stored) or Names())
    left_out = without | due.check(checkpoint, stored, family, config, place)
    _check_text(checkpoint, stored)
    return Dense(checkpoint=checkpoint, family=family, config=config, left_out=left_out, place=place)


def _check_text(checkpoint: Checkpoint, stored: Mapping[str, TensorInfo]) -> None:
    """Refuse a dense text model beside a tower if it is of a known family and not whole."""
    own = places.own_config(checkpoint.config)
    if has_experts(own) or own.get("model_type") not in families.names():
        return
    family = families.of(own)
    try:
        family.config(own)
    except UpcycleError:  # it stays as it is, so that it need not be one that could have experts
        return
    due.refuse_more_blocks(checkpoint.folder, len(stored), family, own)
    place = _within(checkpoint, stored, family, own, alone=False)
    due.check_beside(stored, checkpoint.folder, family, family.config(place.config(checkpoint.config)), place)


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
    due.refuse_more_blocks(where, len(stored), family, own)
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
    return families.of(own)


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
    names = found[0] if found else _of_some(family, family.config(own), stored) or Names(root=family.root)
    tied = places.head_is_tied(raw, _head_is_stored(family, names, stored))
    kind = places.Alone if alone else places.Within
    return kind(names=names, model_type=outer, wrapper=wrapper or Wrapper(architecture=""), tied=tied)


def _of_some(family: Family, config: Config, stored: Collection[str]) -> Names | None:
    """Return how a model that is not whole is spelled, by its first block; None if that is missing, too."""
    first = [name for name in family.shapes(config) if ".0." in name]
    return next(iter(spelled(family, first, stored)), None)


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
