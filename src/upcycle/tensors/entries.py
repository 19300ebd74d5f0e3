"""One tensor of the result: how it is made, and the dtype it is stored in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from upcycle.checkpoints.checkpoint import CHUNK
from upcycle.checkpoints.dtypes import ITEMS
from upcycle.tensors.lazy import Extent, Lazy, blocks


@dataclass(frozen=True)
class Entry:
    """One tensor of the MoE: how it is made, and the dtype it is stored in."""

    lazy: Lazy
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.lazy.shape

    @property
    def nbytes(self) -> int:
        """The number of bytes on disk."""
        return self.lazy.size * ITEMS[self.dtype].itemsize

    @property
    def extents(self) -> list[Extent] | None:
        """The stored bytes that make up the tensor; None if anything has to be computed or cast."""
        return self.lazy.extents() if self.dtype == self.lazy.dtype else None

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the bytes of the tensor in order and in pieces, uint8 [n], each with its offset."""
        start = 0
        for data in self._stored() if self.extents is not None else self._computed():
            yield start, data
            start += data.size

    def _stored(self) -> Iterator[np.ndarray]:
        for extent in self.extents or ():
            for start in range(extent.start, extent.stop, CHUNK):
                yield extent.checkpoint.pread(extent.info, start, min(extent.stop, start + CHUNK))

    def _computed(self) -> Iterator[np.ndarray]:
        for index in blocks(tuple((0, n) for n in self.shape)):
            yield np.ascontiguousarray(self.lazy.read(index, self.dtype)).reshape(-1).view(np.uint8)
