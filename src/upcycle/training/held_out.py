"""The score of a model on held-out rows, which the ranks share among them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from upcycle.errors import UpcycleError
from upcycle.tasks import Batch
from upcycle.training import fit
from upcycle.training.trainee import Trainee


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a model on held-out rows: nats and right answers per target."""

    loss: float
    accuracy: float


@torch.no_grad()
def score(trainee: Trainee, batch: Batch) -> Score:
    """Return the score on held-out rows; every rank gets the same score and has all rows."""
    ranks, model, task = trainee.ranks, trainee.model, trainee.task
    rows = len(next(iter(batch.values())))
    share = -(-rows // ranks.dp_size)
    size = trainee.run.train.micro_batch or max(1, trainee.run.train.rows // ranks.dp_size)
    sums = torch.zeros(3, device=ranks.device, dtype=torch.float64)
    model.eval()
    whole = fit.rows_of_groups(trainee.start.built, trainee.lengths)
    for micro, count in _parts(batch, rows, ranks.dp_rank * share, share, size, whole):
        question = task.question(micro, trainee.start.subject, training=False)
        # All ranks run the same number of passes; the last may have rows that another rank counts.
        found = trainee.scores(question, count)
        if count:
            sums[:2] += torch.stack([x.double() for x in found])
            sums[2] += task.targets({name: t[:count] for name, t in micro.items()})
    model.train()
    loss, correct, targets = ranks.sum(sums).tolist()
    if not targets:
        raise UpcycleError(
            f"none of the {rows} held-out rows has anything to predict; hold out more (data.held_out, "
            f"train.eval_tokens or train.eval_examples), or longer documents"
        )
    return Score(loss=loss / targets, accuracy=correct / targets)


def _parts(
    batch: Batch, rows: int, first: int, share: int, size: int, whole: int
) -> Iterator[tuple[Batch, int]]:
    """Yield micro batches of this rank's share, and the number of their rows that count.

    All ranks run the same number of passes, on multiples of `whole` rows.
    """
    for start in range(first, first + share, size):
        stop = min(start + size, first + share, rows)
        count = max(0, stop - start)
        chosen = (start + torch.arange(-(-max(count, 1) // whole) * whole)) % rows
        yield {name: t[chosen.to(t.device)] for name, t in batch.items()}, count
