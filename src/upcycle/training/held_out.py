"""The score of a model on held-out rows, which the ranks share among them.

Each rank keeps its share on the host, and a micro batch at a time goes to the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from upcycle.errors import UpcycleError
from upcycle.tasks import Batch
from upcycle.training import parts, transfer
from upcycle.training.parallel import Ranks
from upcycle.training.trainee import Trainee


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a model on held-out rows: nats and right answers per target."""

    loss: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A rank's share of the held-out rows, on the host. All ranks have shares of one size.

    `mine` goes on behind the share, so that every pass is whole groups of the routers. After the last of all
    rows come the first ones again.
    """

    rows: int  # of all ranks together
    first: int  # rows before those of this rank
    share: int
    whole: int  # the smallest number of rows that is whole groups
    mine: Batch

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], ranks: Ranks, whole: int) -> Self:
        """Return the share of a rank; `batch` has the rows of all, on the host."""
        rows = len(next(iter(batch.values())))
        share = -(-rows // ranks.dp_size)
        first = ranks.dp_rank * share
        mine = dict(batch)
        if ranks.dp_size > 1:
            chosen = (first + torch.arange(min(rows, share + whole))) % rows
            mine = {name: tensor[chosen] for name, tensor in batch.items()}
        return cls(rows=rows, first=first, share=share, whole=whole, mine=mine)

    def parts(self, size: int) -> Iterator[tuple[Batch, int]]:
        """Yield micro batches of at most `size` rows, or of a whole group, and how many of their rows count.

        All ranks run the same number of passes; the last may have rows that another rank counts.
        """
        kept = len(next(iter(self.mine.values())))
        for start in range(0, self.share, size):
            count = max(0, min(start + size, self.share, self.rows - self.first) - start)
            chosen = (start + torch.arange(-(-max(count, 1) // self.whole) * self.whole)) % kept
            yield {name: tensor[chosen] for name, tensor in self.mine.items()}, count


def whole(trainee: Trainee) -> int:
    """Return the smallest number of rows that is whole groups of every router of a model."""
    return parts.rows_of_groups(trainee.start.built, trainee.lengths)


@torch.no_grad()
def score(trainee: Trainee, held: HeldOut) -> Score:
    """Return the score on held-out rows; every rank gets the same score."""
    ranks, model, task = trainee.ranks, trainee.model, trainee.task
    size = trainee.run.train.micro_batch or max(1, trainee.run.train.rows // ranks.dp_size)
    sums = torch.zeros(3, device=ranks.device, dtype=torch.float64)
    model.eval()
    for rows, count in held.parts(size):
        micro = transfer.to_device(rows, ranks.device)
        question = task.question(micro, trainee.start.subject, training=False)
        found = trainee.scores(question, count)
        if count:
            sums[:2] += torch.stack([x.double() for x in found])
            sums[2] += task.targets({name: t[:count] for name, t in micro.items()})
    model.train()
    loss, correct, targets = ranks.sum(sums).tolist()
    if not targets:
        raise UpcycleError(
            f"none of the {held.rows} held-out rows has anything to predict; hold out more (data.held_out, "
            f"train.eval_tokens or train.eval_examples), or longer documents"
        )
    return Score(loss=loss / targets, accuracy=correct / targets)
