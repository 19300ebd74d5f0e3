"""The documents in rows of tokens, one after another: how long each is, and which have like lengths.

They are found on the host, so that nothing waits for the device. Letters: B rows, L tokens of a row, N tokens
of some documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Alike:
    """Documents of like lengths: where their tokens are in the rows, and in rows of their own."""

    count: int  # documents
    longest: int  # tokens of the longest one, which is less than twice as long as the shortest
    tokens: Tensor  # int64 [N]: places in the rows, counted through all rows
    places: Tensor  # int64 [N]: places in `count` rows of `longest` tokens, counted likewise


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of rows [B, L]; `lengths` counts the tokens of each, int64 in their order."""

    lengths: np.ndarray
    device: torch.device

    @classmethod
    def of(cls, positions: Tensor, device: torch.device) -> Documents:
        """Return the documents of rows for a model on `device`; `positions` [B, L] had better be on the host.

        A document begins in every row, and wherever the position does not grow by one.
        """
        known = positions.cpu().numpy()
        begins = np.ones(known.shape, bool)
        begins[:, 1:] = np.diff(known) != 1
        return cls(np.diff(np.flatnonzero(begins), append=known.size), device)

    @property
    def longest(self) -> int:
        """The tokens of the longest one."""
        return int(self.lengths.max())

    @cached_property
    def borders(self) -> Tensor:
        """The tokens before each document, and those of all of them: int32 on the device."""
        return self._moved(np.append(0, self.lengths.cumsum()).astype(np.int32))

    @cached_property
    def alike(self) -> tuple[Alike, ...]:
        """The documents in groups, each with lengths that one power of two is the next above.

        In rows of their own the documents of a group take less than twice their tokens.
        """
        found = [*self._alike()]
        return tuple(
            Alike(count=count, longest=longest, tokens=tokens, places=places)
            for (count, longest, _), (tokens, places) in zip(
                found, (self._moved(index) for *_, index in found), strict=True
            )
        )

    def _alike(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield of each group the documents, the longest length, and both kinds of places, [2, N]."""
        lengths = self.lengths
        starts = lengths.cumsum() - lengths
        kinds = np.ceil(np.log2(lengths)).astype(int)
        for kind in np.unique(kinds):
            own = np.flatnonzero(kinds == kind)
            longest, sizes = int(lengths[own].max()), lengths[own]
            within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
            tokens = np.repeat(starts[own], sizes) + within
            places = np.repeat(np.arange(len(own)) * longest, sizes) + within
            yield len(own), longest, np.stack([tokens, places])

    def _moved(self, numbers: np.ndarray) -> Tensor:
        """Return numbers on the device. From pinned memory the copy waits for nothing that is queued."""
        tensor = torch.from_numpy(numbers)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)
