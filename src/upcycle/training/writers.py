"""Two ways to write the checkpoints of a run: before the next step begins, or beside the steps.

Beside the steps, a thread writes a copy of the tensors. A checkpoint counts only when all of it is on disk,
because hashes, `state.json`, the rename and the removal of older checkpoints are the thread's last work.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from upcycle.records.state import RunState
from upcycle.training import saving
from upcycle.training.parallel import Ranks
from upcycle.training.sections import Saving


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A checkpoint that could not be written. What was there before it is unchanged."""

    step: int
    reason: str


class Writer(ABC):
    """Writes the checkpoints of a run; every rank calls it at the same steps."""

    def __init__(self, out: Path, keep: int) -> None:
        self._out, self._keep = out, keep
        self._failures: list[Failure] = []

    @abstractmethod
    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: RunState) -> None:
        """Write checkpoint `state.step`, or begin to; the model may change as soon as this returns."""

    @abstractmethod
    def wait(self) -> None:
        """Return when nothing is being written; an interrupt meanwhile gives up what is."""

    def failures(self) -> list[Failure]:
        """Return the failures since the last call."""
        found, self._failures = self._failures, []
        return found

    def _note(self, step: int, reason: str | None) -> None:
        if reason is not None:
            self._failures = [*self._failures, Failure(step=step, reason=reason)]


class BetweenSteps(Writer):
    """Writes a checkpoint before the next step begins."""

    def __init__(self, out: Path, keep: int, ranks: Ranks) -> None:
        super().__init__(out, keep)
        self._ranks = ranks

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: RunState) -> None:
        self._note(state.step, saving.save(self._out, model, optimizer, state, self._ranks, self._keep))

    def wait(self) -> None:
        """Return at once, because nothing is left to wait for."""


class BesideSteps(Writer):
    """Writes a checkpoint while the steps go on: one at a time, from a copy in the host's memory.

    The memory of the copy is taken at the first checkpoint and used again for the others.
    """

    def __init__(self, out: Path, keep: int, ranks: Ranks, beside: Ranks) -> None:
        """`ranks` are those of the steps, `beside` those of the thread (`Ranks.beside`)."""
        super().__init__(out, keep)
        self._ranks, self._beside = ranks, beside
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: tuple[int, Future[str | None]] | None = None
        on_device = ranks.device.type != "cpu"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_device,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_device,
            )
        )

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: RunState) -> None:
        self.wait()
        copy, reason = saving.agreed(
            lambda: self._stager.stage(saving.tensors_of(model, optimizer)), self._ranks
        )
        if reason is not None:  # on every rank, or the others would wait in their threads
            self._note(state.step, reason)
            return
        work = self._thread.submit(saving.write, self._out, copy, state, self._beside, self._keep, self._stop)
        self._under_way = state.step, work

    def wait(self) -> None:
        if self._under_way is None:
            return
        step, work = self._under_way
        try:
            reason = work.result()
        except BaseException:
            self._stop.set()
            raise
        self._under_way = None
        self._note(step, reason)

    def failures(self) -> list[Failure]:
        if self._under_way is not None and self._under_way[1].done():
            self.wait()
        return super().failures()

    def close(self) -> None:
        """Finish what is being written, unless an interrupt gave it up."""
        try:
            if not self._stop.is_set():
                self.wait()
        finally:
            self._thread.shutdown()
            self._stager.close()


@contextmanager
def writer(out: Path, settings: Saving, ranks: Ranks) -> Iterator[Writer]:
    """Yield the writer of a run; what it is writing at the end is finished, whatever ended the run."""
    if not settings.asynchronous:
        yield BetweenSteps(out, settings.keep, ranks)
        return
    with saving.alone(), ranks.beside() as beside:
        made = BesideSteps(out, settings.keep, ranks, beside)
        try:
            yield made
        finally:
            made.close()
