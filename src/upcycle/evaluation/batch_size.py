"""The batch size of an evaluation: chosen from the free memory, and halved when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from upcycle.errors import UpcycleError
from upcycle.system import memory

MOST = 64  # rows; more than this is no faster on a CPU, and costs more padding
_SHARE = 0.25  # the share of the free memory that a forward pass may take

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass
class BatchSize:
    """The largest number of rows and of tokens (with padding) in a forward pass.

    Both may be lowered after memory ran out, unless other processes run the same batches.
    """

    rows: int
    tokens: int | None = None  # None: any number
    fixed: bool = False  # whether it stays when memory runs out

    @classmethod
    def of(cls, settings: Mapping[str, Any], device: torch.device, *, fixed: int = 0) -> BatchSize:
        """Return a batch of `fixed` rows, or one that fits the free memory if `fixed` is 0.

        The estimate counts, for each token, the logits in float32 twice and 16 vectors of the width of the
        model.
        """
        width = int(settings.get("hidden_size") or settings.get("d_model") or 0)
        token = 4 * (2 * int(settings.get("vocab_size") or 0) + 16 * width)
        free = _free(device)
        if fixed or free is None or not token:
            return cls(fixed or MOST)
        return cls(MOST, max(1, int(_SHARE * free) // token))

    @classmethod
    def agreed(cls, sizes: Sequence[BatchSize]) -> BatchSize:
        """Return the size that fits wherever one of `sizes` does, and stays as it is."""
        tokens = [size.tokens for size in sizes if size.tokens is not None]
        return cls(min(size.rows for size in sizes), min(tokens, default=None), fixed=True)

    def over(
        self,
        items: Sequence[Item],
        work: Callable[[Sequence[Item]], Sequence[Found]],
        *,
        length: Callable[[Item], int] = lambda item: 1,
        advance: Callable[[int], None] = lambda n: None,
    ) -> list[Found]:
        """Apply `work` to `items`, a batch at a time, and return one result for each item, in order.

        `length` gives the number of tokens of an item. `advance` is called with the number of items just
        done. Raises `UpcycleError` if the memory is too small for a single item.
        """
        out: list[Found] = []
        while len(out) < len(items):
            part = self._next(items[len(out) : len(out) + self.rows], length)
            try:
                found = work(part)
            except (RuntimeError, MemoryError) as error:
                if not _ran_out(error):
                    raise
                if len(part) == 1:
                    raise UpcycleError(
                        f"memory ran out on a single row, of {length(part[0])} tokens; take a machine "
                        "with more, or shorten the rows"
                    ) from None
                if self.fixed:
                    raise UpcycleError(
                        f"memory ran out on {len(part)} rows of up to {max(map(length, part))} tokens, and "
                        f"processes that share a model cannot take fewer one by one; set eval.batch_size"
                    ) from None
                self.rows = len(part) // 2
                if torch.accelerator.is_available():
                    torch.accelerator.empty_cache()
                continue
            assert len(found) == len(part)
            out.extend(found)
            advance(len(part))
        return out

    def _next(self, items: Sequence[Item], length: Callable[[Item], int]) -> Sequence[Item]:
        """Return the first of `items`, as many as fit, and at least one."""
        if self.tokens is None:
            return items
        longest = 0
        for count, item in enumerate(items):
            longest = max(longest, length(item))
            if count and longest * (count + 1) > self.tokens:
                return items[:count]
        return items


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return memory.available() if device.type == "cpu" else None


def _ran_out(error: BaseException) -> bool:
    """Return whether an error means that memory ran out.

    The allocator of torch raises a plain RuntimeError on a CPU.
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
