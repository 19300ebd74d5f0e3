"""Tensors that a checkpoint stores twice, although its config says that they are one."""

from __future__ import annotations

import numpy as np

from upcycle.checkpoints.checkpoint import CHUNK, Checkpoint
from upcycle.checkpoints.header import TensorInfo
from upcycle.dense.leaving_out import DROPPED, without
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError


def refuse_two_heads(dense: Dense) -> None:
    """Raise `UpcycleError` for what `difference` says."""
    if (said := difference(dense)) is not None:
        raise UpcycleError(said)


def difference(dense: Dense) -> str | None:
    """Say that a head has other values than the table that config.json ties it to, which is ambiguous.

    transformers 5 keeps the two apart if they differ. It is the same for other tensors that a class ties. A
    tensor that the recipe drops is not asked about. This reads both tensors, and asks nothing about a
    checkpoint of headers alone.
    """
    opened = dense.checkpoint
    if opened.headers_only:
        return None
    for names in dense.family.twins(dense.config).items():
        twin, other = map(dense.place.names.stored, names)
        if other not in opened.tensors or dense.left_out.get(twin, DROPPED).startswith(DROPPED):
            continue
        if not _same(opened, opened.tensors[twin], opened.tensors[other]):
            is_head = not twin.endswith((".bias", ".embed_tokens.weight"))
            untie = "set tie_word_embeddings to false in config.json, or " if is_head else ""
            return (
                f"{opened.folder} stores an {twin} that differs from {other}, to which its class ties it; "
                f"{untie}{without(opened, twin, twin)}"
            )
    return None


def _same(opened: Checkpoint, one: TensorInfo, other: TensorInfo) -> bool:
    """Return whether two tensors of a checkpoint are of the same type, shape and bytes."""
    return (one.shape, one.dtype) == (other.shape, other.dtype) and all(
        np.array_equal(opened.pread(one, i, j), opened.pread(other, i, j))
        for i in range(0, one.nbytes, CHUNK)
        for j in (min(one.nbytes, i + CHUNK),)
    )
