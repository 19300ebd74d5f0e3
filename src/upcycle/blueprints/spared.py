"""The tensors of dense models that a blueprint has no use for, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from upcycle.checkpoints.header import TensorInfo
from upcycle.dense.adapted import Adapted
from upcycle.errors import UpcycleError, listed

if TYPE_CHECKING:
    from upcycle.blueprints.blueprint import Blueprint

_NETWORK = "no expert is made of it"
_REST = "what is no expert comes from another model (init.backbone)"
_TIED = "it changes a head that is tied to the embeddings"


def of(built: Blueprint) -> dict[str, str]:
    """Return the stored tensors that are of no use, with the reason; those of a donor carry its label."""
    if not built.donors:
        return {}
    used = {info for entry in built.entries.values() for info in entry.lazy.sources()}
    labels = {info: c.label for c in built.checkpoints for info in c.tensors.values()}
    known = {
        info: reason for place in range(len(built.donors) + 1) for info, reason in _of_model(built, place)
    }
    out = {
        info.name if labels[info] == "source" else f"{labels[info]}: {info.name}": reason
        for info, reason in known.items()
        if info not in used
    }
    for model in built.donors:
        said = {name for name in built.dense.left_out if not built.predicts_further(name)}
        theirs = {n: why for n, why in model.left_out.items() if n not in said}
        out |= {f"{model.checkpoint.label}: {name}": reason for name, reason in theirs.items()}
    return out


def _of_model(built: Blueprint, place: int) -> Iterator[tuple[TensorInfo, str]]:
    """Yield the stored tensors of one model that nothing is made of, each with the reason."""
    init, model = built.recipe.init, (built.dense, *built.donors)[place]
    in_backbone = place in init.in_backbone
    in_experts = place in init.in_experts or (in_backbone and built.recipe.moe.shared_experts > 0)
    for name, tensor in (model.tensors | model.around).items():
        network = owned(built, name)
        if not (in_experts if network else in_backbone):
            for info in tensor.sources():
                yield info, _NETWORK if network else _REST
    if isinstance(model, Adapted):
        for name in model.homeless:
            for part in (model.changes[name].left, model.changes[name].right):
                for info in part.sources():
                    yield info, _TIED


def lost_changes(built: Blueprint, place: int) -> list[str]:
    """Return the tensors that a donor's adapter changes and that are not in the result; `place` is its place.

    Raises `UpcycleError` if these are all that it changes.
    """
    model = built.donors[place - 1]
    if not isinstance(model, Adapted):
        return []
    kept = {name for name in model.changes if owned(built, name)}
    if place in built.recipe.init.in_backbone:
        kept |= {*model.tensors, *model.around}
    lost = sorted(name for name in model.changes if name not in kept)
    if len(lost) == len(model.changes):
        raise UpcycleError(
            f"{model.adapter.checkpoint.folder} changes no network that becomes experts, only "
            f"{listed(lost)}, so that its expert would be its base's; mix it into the rest (init.backbone = "
            f'"average"), or leave it out'
        )
    return lost


def owned(built: Blueprint, name: str) -> bool:
    """Return whether a tensor of the dense model belongs to a network that becomes experts."""
    return any(built.dense.stack(site.stack).owns(name, site.layer) for site in built.sites)
