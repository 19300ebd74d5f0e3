"""The rows of a run in the stage that it is in: the batches of its rank, and those that are held out."""

from __future__ import annotations

import numpy as np
import torch

from upcycle.data.feeding import Feed
from upcycle.records.state import RunState
from upcycle.tasks import Batch, Task
from upcycle.training.course import Leg
from upcycle.training.feeds import Feeds
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run


class Rows:
    """The rows that the model reads next, and those that it is scored on."""

    held_out: Batch | None  # on the device; None if there are none, or if the run has no scores

    def __init__(self, run: Run, task: Task, feeds: Feeds, here: Ranks, leg: Leg) -> None:
        self._run, self._task, self._feeds, self._device = run, task, feeds, here.device
        share = run.train.rows // here.dp_size
        self._part = slice(here.dp_rank * share, (here.dp_rank + 1) * share)
        self._feed: Feed | None = None
        self.enter(leg)

    def enter(self, leg: Leg) -> None:
        """Go to the data of a stage, which may be those of the one before."""
        if (feed := self._feeds.of(leg)) is not self._feed:
            self._feed, self.held_out = feed, self._held_out(feed)

    def next(self, state: RunState) -> tuple[int, dict[str, np.ndarray]]:
        """Return the number of the next batch and this rank's rows of it; those that harmed are passed."""
        number = state.drawn
        while number in state.passed:
            self._drawn()
            number += 1
        return number, self._drawn()

    def on_device(self, batch: dict[str, np.ndarray]) -> Batch:
        """Return a batch on the device. From pinned memory the copy waits for nothing that is queued."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in batch.items()}
        if self._device.type != "cuda":
            return {name: tensor.to(self._device) for name, tensor in tensors.items()}
        return {n: tensor.pin_memory().to(self._device, non_blocking=True) for n, tensor in tensors.items()}

    def _drawn(self) -> dict[str, np.ndarray]:
        assert self._feed is not None
        return self._feed.next(self._run.train.rows, self._part)

    def _held_out(self, feed: Feed) -> Batch | None:
        """Return the held-out rows: for examples all, unless the run asks for fewer."""
        if not self._run.train.eval_every:
            return None
        everything = self._task.by_example and self._run.train.eval_examples is None
        batch = feed.held_out(None if everything else self._run.train.eval_rows)
        return self.on_device(batch) if len(next(iter(batch.values()))) else None
