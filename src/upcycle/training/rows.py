"""The rows of a run in the stage that it is in: the batches of its rank, and those that are held out."""

from __future__ import annotations

import numpy as np
import torch

from upcycle.data.feeding import Feed
from upcycle.records.state import RunState
from upcycle.tasks import Batch
from upcycle.training import held_out, transfer
from upcycle.training.course import Leg
from upcycle.training.feeds import Feeds
from upcycle.training.held_out import HeldOut
from upcycle.training.trainee import Trainee


class Rows:
    """The rows that the model reads next, and those that it is scored on."""

    held_out: HeldOut | None  # None if there are none, or if the run has no scores

    def __init__(self, trainee: Trainee, feeds: Feeds, leg: Leg) -> None:
        self._train, self._task, self._feeds = trainee.run.train, trainee.task, feeds
        self._whole = held_out.whole(trainee)
        self._here = here = trainee.ranks
        share = self._train.rows // here.dp_size
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
        """Return a batch on the device."""
        return transfer.to_device(_tensors(batch), self._here.device)

    def _drawn(self) -> dict[str, np.ndarray]:
        assert self._feed is not None
        return self._feed.next(self._train.rows, self._part)

    def _held_out(self, feed: Feed) -> HeldOut | None:
        """Return the held-out rows: for examples all, unless the run asks for fewer."""
        if not self._train.eval_every:
            return None
        everything = self._task.by_example and self._train.eval_examples is None
        batch = _tensors(feed.held_out(None if everything else self._train.eval_rows))
        return HeldOut.of(batch, self._here, self._whole) if len(next(iter(batch.values()))) else None


def _tensors(batch: dict[str, np.ndarray]) -> Batch:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}
