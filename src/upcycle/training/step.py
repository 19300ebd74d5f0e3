"""One training step (forward, losses, backward, update), and the score on held-out rows.

Every loss is a mean over the global batch. A rank computes its part of the sum. FSDP2 averages gradients over
the ranks that see different rows, so each part is multiplied by their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from upcycle.errors import UpcycleError
from upcycle.tasks import Batch, Question, Task
from upcycle.training import fit, gradients, router_losses, routing
from upcycle.training import optimizer as optim
from upcycle.training.parallel import Ranks
from upcycle.training.routing import Routers, Tally
from upcycle.training.run import Run
from upcycle.training.seeds import torch_seed
from upcycle.training.start import Start


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model in training, with everything that a step needs."""

    model: PreTrainedModel
    task: Task
    start: Start
    optimizer: torch.optim.Optimizer
    routers: Routers | None
    run: Run
    ranks: Ranks
    precision: str

    @property
    def lengths(self) -> dict[str, int]:
        """The tokens of a row in each stack of blocks."""
        return self.task.lengths(self.run.train.sequence_length, self.start.subject)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context for bfloat16 arithmetic with float32 weights, unless FSDP2 does this itself."""
        if self.precision != "mixed" or self.ranks.dp_size > 1:
            return nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)

    def logits(self, question: Question, **options: Any) -> Tensor:
        """Return the model's logits for a question."""
        with self.autocast():
            out: Tensor = self.model(**question.inputs, **options).logits
        return out


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of a step, over the global batch."""

    loss: float  # cross-entropy, nats per target
    grad_norm: float
    tallies: Sequence[Tally] = ()  # one per layer, on the CPU
    balance_loss: float | None = None  # mean or sum over layers; each is top_k at perfect balance
    z_loss: float | None = None
    own_losses: Mapping[str, float] = field(default_factory=dict)  # the routers' own losses
    router_grad_norms: Sequence[float] = ()


def train_step(trainee: Trainee, batch: Batch, step: int, lr: float) -> Outcome:
    """Update the model on this rank's part of the global batch.

    Raises `UpcycleError` if the loss or a gradient is not finite.
    """
    run, ranks, routers = trainee.run, trainee.ranks, trainee.routers
    # Use one seed per step and rank, so that dropout, jitter and augmentation need no state in a checkpoint.
    torch.manual_seed(torch_seed(run.train_seed * 1_000_003 + step * 997 + ranks.dp_rank))
    micros = _split(batch, run.train.micro_batch)
    questions = [trainee.task.question(micro, trainee.start.subject, training=True) for micro in micros]
    targets = ranks.total(trainee.task.targets(batch))
    known = _count_ahead(trainee, questions, step) if _needs_counts_ahead(run, routers, micros) else None
    sums: Tensor | None = None  # cross-entropy, balance, z, and the routers' own losses
    total: Tensor | None = None
    for place, question in enumerate(questions):
        with _recorded(trainee, step, place):
            logits = trainee.logits(question)
        entropy = trainee.task.loss(logits, question.labels) / targets
        del logits
        loss, parts = entropy, [entropy.detach()]
        if routers is not None:
            seen = ranks.sum(routers.tallies())
            total = seen if total is None else total + seen
            share = 1.0 if known is not None else (place + 1) / len(micros)
            extra = _router_losses(trainee, total if known is None else known, share, len(micros))
            loss = loss + extra.total
            parts += extra.values()
        found = torch.stack(parts).double()
        sums = found if sums is None else sums + found
        (loss * ranks.dp_size).backward()
    assert sums is not None
    entropy_sum, *others = ranks.sum(sums).tolist()
    grads = {n: p.grad for n, p in trainee.model.named_parameters() if p.grad is not None}
    squares = gradients.squared_norms(grads)
    norm = sum(squares.values()) ** 0.5
    _refuse_nonfinite(step, entropy_sum, squares)
    if run.train.clip_grad_norm and norm > run.train.clip_grad_norm:
        gradients.scale(grads.values(), run.train.clip_grad_norm / norm)
    optim.set_rate(trainee.optimizer, lr)
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    if routers is None or total is None:
        return Outcome(loss=entropy_sum, grad_norm=norm)
    if run.router.bias_update_rate:
        routing.update_biases(routers.biases(), routers.read(total), run.router.bias_update_rate)
    tallies = routers.read(total.cpu())
    own = router_losses.own_names(routers.said)
    balance_sum, z_sum, *own_sums = others
    routers.said.clear()
    return Outcome(
        loss=entropy_sum,
        grad_norm=norm,
        tallies=tallies,
        balance_loss=balance_sum,
        z_loss=z_sum,
        own_losses=dict(zip(own, own_sums, strict=True)),
        router_grad_norms=[
            sum(s for n, s in squares.items() if n.startswith(f"{name}.")) ** 0.5 for name in routers.names
        ],
    )


def _split(batch: Batch, size: int | None) -> list[Batch]:
    """Split a batch into parts of `size` rows."""
    names = list(batch)
    parts = zip(*(batch[name].split(size or len(batch[name])) for name in names), strict=True)
    return [dict(zip(names, part, strict=True)) for part in parts]


def _recorded(trainee: Trainee, step: int, place: int) -> AbstractContextManager[Any]:
    """Return a context that records the routers in the forward pass of micro batch `place`."""
    if trainee.routers is None:
        return nullcontext()
    seed = (trainee.run.train_seed * 1_000_003 + step) * 4099 + place * 257 + trainee.ranks.dp_rank
    return trainee.routers.recording(jitter=trainee.run.router.jitter, seed=seed)


def _needs_counts_ahead(run: Run, routers: Routers | None, micros: Sequence[Batch]) -> bool:
    """Return whether the first backward pass needs the global batch's f_e in advance."""
    router = run.router
    exact = router.balance_loss == "per_layer" and router.balance_counts == "exact"
    return bool(routers is not None and len(micros) > 1 and exact and router.balance_loss_coef)


@torch.no_grad()
def _count_ahead(trainee: Trainee, questions: Sequence[Question], step: int) -> Tensor:
    """Return the tallies of the global batch from a separate forward pass."""
    routers = trainee.routers
    assert routers is not None
    total: Tensor | None = None
    device = trainee.ranks.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        for place, question in enumerate(questions):
            with _recorded(trainee, step, place):
                trainee.logits(question, **trainee.task.counting)
            total = routers.tallies() if total is None else total + routers.tallies()
    assert total is not None
    return trainee.ranks.sum(total)


def _router_losses(trainee: Trainee, tallies: Tensor, share: float, micros: int) -> router_losses.Part:
    """Compute this micro batch's part of the router losses; `tallies` cover the part `share` of the batch."""
    routers = trainee.routers
    assert routers is not None
    return router_losses.part(
        routers.said,
        routers.read(tallies),
        trainee.run.router,
        share=share,
        parts=micros * trainee.ranks.dp_size,
    )


def _refuse_nonfinite(step: int, loss: float, squares: dict[str, float]) -> None:
    """Stop before the weights change, and name the first gradient that is not finite."""
    bad = next((name for name, square in squares.items() if not square < float("inf")), None)
    if bad is None and abs(loss) < float("inf"):
        return
    what = f"the first gradient that is not finite is that of {bad}" if bad else "no gradient is affected"
    raise UpcycleError(
        f"step {step + 1}: the loss is {loss:g}; {what}. The weights were not updated and the last "
        f"checkpoint is kept; lower schedule.peak, lengthen the warm-up, or look at the data of this step"
    )


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a model on held-out rows: nats and right answers per target."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(trainee: Trainee, batch: Batch) -> Score:
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
        logits, labels = trainee.logits(question)[:count], question.labels[:count]
        targets = task.targets({name: t[:count] for name, t in micro.items()})
        if count:
            found = [task.loss(logits, labels), task.correct(logits, labels), logits.new_tensor(targets)]
            sums += torch.stack([x.double() for x in found])
    model.train()
    loss, correct, targets = ranks.sum(sums).tolist()
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
