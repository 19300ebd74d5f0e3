"""Tensors that a checkpoint stores twice, although its config says that they are one."""

from __future__ import annotations

import numpy as np

from upcycle.checkpoints.checkpoint import CHUNK, Checkpoint
from upcycle.checkpoints.header import TensorInfo
from upcycle.dense.leaving_out import DROPPED, without
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError


def refuse_two_heads(dense: Dense) -> None:
    """Refuse a config that ties a head although a head with other values is stored, which is ambiguous.

    transformers 5 keeps the two apart if they differ. A head that the recipe drops is not asked about. This
    reads both tensors, and asks nothing about a checkpoint of headers alone.
    """
    opened = dense.checkpoint
    for names in dense.family.twins(dense.config).items():
        head, other = map(dense.place.names.stored, names)
        if dense.left_out.get(head, DROPPED).startswith(DROPPED) or opened.headers_only:
            continue
        if not _same(opened, opened.tensors[head], opened.tensors[other]):
            raise UpcycleError(
                f"{opened.folder} stores an {head} that differs from {other}, to which its config ties it; "
                f"set tie_word_embeddings to false in config.json, or {without(opened, head, head)}"
            )


def _same(opened: Checkpoint, one: TensorInfo, other: TensorInfo) -> bool:
    """Return whether two tensors of a checkpoint are of the same type, shape and bytes."""
    return (one.shape, one.dtype) == (other.shape, other.dtype) and all(
        np.array_equal(opened.pread(one, i, j), opened.pread(other, i, j))
        for i in range(0, one.nbytes, CHUNK)
        for j in (min(one.nbytes, i + CHUNK),)
    )
