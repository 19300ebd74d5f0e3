"""The stored tensors that a recipe leaves out of a checkpoint, and how it is told to."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.header import TensorInfo
from upcycle.errors import UpcycleError, shown

if TYPE_CHECKING:
    from upcycle.dense.source import Dense

DROPPED = "the recipe drops "  # the beginning of a reason; the pattern of the recipe follows
_DROPPING = {"source": "drop, or --drop {}", "teacher": "teacher.drop"}  # by the role of a checkpoint


def that_find(checkpoint: Checkpoint, drop: Iterable[str]) -> tuple[str, ...]:
    """Return the names and patterns of `drop` that some stored tensor has."""
    return tuple(pattern for pattern in drop if fnmatch.filter(checkpoint.tensors, pattern))


def dropped(checkpoint: Checkpoint, drop: tuple[str, ...]) -> dict[str, str]:
    """Return the stored tensors that a recipe leaves out. Raises `UpcycleError` if a pattern finds none."""
    found = {pattern: fnmatch.filter(checkpoint.tensors, pattern) for pattern in drop}
    if idle := [pattern for pattern, names in found.items() if not names]:
        raise UpcycleError(f"drop: {checkpoint.folder} holds no tensor called {shown(idle[0])}")
    return {name: DROPPED + pattern for pattern, names in found.items() for name in names}


def kept(checkpoint: Checkpoint, without: Collection[str]) -> dict[str, TensorInfo]:
    """Return the stored tensors except those of the names in `without`."""
    return {name: info for name, info in checkpoint.tensors.items() if name not in without}


def drops_head(dense: Dense) -> bool:
    """Return whether the recipe drops a stored head, so that the embedding takes its place."""
    names = dense.family.tied
    return names is not None and dense.left_out.get(dense.place.names.stored(names[0]), "").startswith(
        DROPPED
    )


def dropped_twins(dense: Dense) -> dict[str, str]:
    """Return the other tensors that the recipe drops and that the class ties, with what takes their place."""
    head = dense.family.tied[0] if dense.family.tied else ""
    return {
        twin: other
        for twin, other in dense.family.twins(dense.config).items()
        if twin != head and dense.left_out.get(twin, "").startswith(DROPPED)
    }


def without(opened: Checkpoint, what: str, name: str = "NAME") -> str:
    """Say how tensors of a checkpoint are left out, which are called `what` in the sentence."""
    if opened.label in _DROPPING:
        return f"leave {what} out ({_DROPPING[opened.label].format(name)})"
    return f"take {what} out of its files"
