"""One training step: forward, losses, backward, update.

Every loss is a mean over the global batch. A rank computes its part of the sum. FSDP2 averages gradients over
the ranks that see different rows, so each part is multiplied by their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from upcycle.tasks import Batch, Question
from upcycle.training import gradients, router_losses, routing
from upcycle.training import optimizer as optim
from upcycle.training.outcome import Outcome, Queued
from upcycle.training.routing import Routers
from upcycle.training.run import Run
from upcycle.training.seeds import Seeds
from upcycle.training.trainee import Trainee
from upcycle.training.transfer import Transfer


def train_step(trainee: Trainee, batch: Batch, step: int, lr: float) -> Outcome:
    """Update the model on this rank's part of the global batch, and wait until that is done.

    Raises `UpcycleError` if the loss or a gradient is not finite; then the weights are as they were.
    """
    return queue_step(trainee, batch, step, lr).outcome()


def queue_step(trainee: Trainee, batch: Batch, step: int, lr: float, stop: Sequence[int] = ()) -> Queued:
    """Queue an update of the model on this rank's part of the global batch.

    The host waits for nothing, apart from what transformers' or torch's own code waits for. The update is
    skipped on the device if the loss or a gradient is not finite. `stop` holds the signals by which this rank
    was asked to stop, which the others learn from the step's numbers.
    """
    run, ranks = trainee.run, trainee.ranks
    seeds = Seeds(run=run.train_seed, step=step, rank=ranks.dp_rank)
    torch.manual_seed(seeds.of_step)
    batch_sums = _backward(trainee, batch, seeds)
    sums = ranks.sum(batch_sums.losses)
    grads = {n: p.grad for n, p in trainee.model.named_parameters() if p.grad is not None}
    if trainee.kept is not None:
        trainee.kept.clear(grads)
    squares = gradients.squared_norms(grads)
    # Every rank knows the same sums, so all of them skip alike.
    finite = (squares.sum() + sums[0]).isfinite()
    stands_out = torch.zeros_like(finite)
    if trainee.recent is not None:
        stands_out = trainee.recent.judge(sums[0], squares.sum().sqrt(), finite)
    numbers = {"sums": sums, "squares": squares, "stopping": ranks.seen(bool(stop))}
    numbers |= {"finite": finite, "stands_out": stands_out}
    queued = _queued(trainee, step, numbers, [*grads], batch_sums.tallies)
    if run.train.clip_grad_norm:
        # In double precision: the norm's square of a float32 gradient may be beyond float32.
        gradients.scale(grads.values(), (run.train.clip_grad_norm / squares.sum().sqrt()).clamp(max=1.0))
    skipped = ~finite if run.spikes.act == "warn" else ~finite | stands_out
    _update(trainee, queued, skipped, lr, batch_sums.tallies)
    return queued


@dataclass(frozen=True, kw_only=True)
class _BatchSums:
    """The sums over the micro batches of a step."""

    losses: Tensor  # [n], this rank's: cross-entropy, balance, z, the routers' own, the teacher's divergence
    tallies: Tensor | None  # of the routers, over all ranks; None without routers


def _backward(trainee: Trainee, batch: Batch, seeds: Seeds) -> _BatchSums:
    """Run all micro batches forward and backward, so that the gradients are those of the batch."""
    run, ranks, routers = trainee.run, trainee.ranks, trainee.routers
    micros = _split(batch, run.train.micro_batch)
    questions = [trainee.task.question(micro, trainee.start.subject, training=True) for micro in micros]
    targets = _all_targets(trainee, batch)
    known = _count_ahead(trainee, questions, seeds) if _needs_counts_ahead(run, routers, micros) else None
    shares = _shares(micros)
    sums: Tensor | None = None
    tallies: Tensor | None = None
    for place, question in enumerate(questions):
        with _recorded(trainee, question, seeds, place):
            of_micro = trainee.losses(question, micros[place])
        loss, (entropy, *taught) = of_micro.total / targets, [each / targets for each in of_micro.terms()]
        parts = [entropy]
        if routers is not None:
            seen = ranks.sum(routers.tallies())
            tallies = seen if tallies is None else tallies + seen
            covered = 1.0 if known is not None else shares[place]
            extra = _router_losses(trainee, tallies if known is None else known, covered, len(micros))
            loss = loss + extra.total
            parts += extra.values()
        numbers = torch.stack([*parts, *taught]).double()
        sums = numbers if sums is None else sums + numbers
        (loss * ranks.dp_size).backward()
    assert sums is not None
    return _BatchSums(losses=sums, tallies=tallies)


def _queued(
    trainee: Trainee, step: int, numbers: dict[str, Tensor], names: Sequence[str], tallies: Tensor | None
) -> Queued:
    """Send the numbers of a step to the host; `names` are the parameters that have a gradient."""
    routers = trainee.routers
    queued = Queued(
        step=step,
        transfer=Transfer(numbers if tallies is None else numbers | {"tallies": tallies}),
        gradients=names,
        spikes=trainee.run.spikes,
        taught=trainee.teacher is not None,
    )
    if routers is None:
        return queued
    own = router_losses.own_names(routers.outputs)
    return replace(queued, kinds=routers.kinds(), routers=routers.names, own=own)


def _update(trainee: Trainee, queued: Queued, skipped: Tensor, lr: float, tallies: Tensor | None) -> None:
    """Update the weights and the routers' biases unless the step is `skipped`, [] on the device."""
    optim.set_rate(trainee.optimizer, lr)
    # An optimizer that cannot skip an update on the device waits.
    if optim.skip_if(trainee.optimizer, skipped) or not queued.outcome().skipped(queued.spikes):
        trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    if trainee.kept is not None:
        trainee.kept.put_back()
    routers = trainee.routers
    if routers is not None and tallies is not None:
        if rate := trainee.run.router.bias_rate(queued.step):
            # biases stay where weights stay
            routing.update_biases(routers.biases(), routers.read(tallies), ~skipped * rate)
        routers.outputs.clear()


def _all_targets(trainee: Trainee, batch: Batch) -> Tensor | int:
    """Return the number of predictions in the global batch; a tensor if only the labels tell it.

    It is 1 for a batch without any, whose losses are sums of nothing.
    """
    mine = trainee.task.targets(batch)
    ranks = trainee.ranks
    return ranks.sum(mine).clamp(min=1) if isinstance(mine, Tensor) else mine * ranks.dp_size


def _split(batch: Batch, size: int | None) -> list[Batch]:
    """Split a batch into parts of `size` rows."""
    names = list(batch)
    parts = zip(*(batch[name].split(size or len(batch[name])) for name in names), strict=True)
    return [dict(zip(names, part, strict=True)) for part in parts]


def _shares(micros: Sequence[Batch]) -> list[float]:
    """Return the share of the batch's rows in each micro batch and those before it; the last may be short."""
    rows = [*itertools.accumulate(len(next(iter(micro.values()))) for micro in micros)]
    return [seen / rows[-1] for seen in rows]


def _recorded(trainee: Trainee, question: Question, seeds: Seeds, place: int) -> AbstractContextManager[Any]:
    """Return a context that records the routers in the forward pass of micro batch `place`, a `question`."""
    if trainee.routers is None:
        return nullcontext()
    return trainee.routers.recording(
        question.inputs.get("attention_mask"),
        jitter=trainee.run.router.jitter,
        seeds=replace(seeds, micro=place),
    )


def _needs_counts_ahead(run: Run, routers: Routers | None, micros: Sequence[Batch]) -> bool:
    """Return whether the first backward pass needs the global batch's f_e in advance."""
    router = run.router
    exact = router.balance_loss == "per_layer" and router.balance_counts == "exact"
    return bool(routers is not None and len(micros) > 1 and exact and router.balance_loss_coef)


@torch.no_grad()
def _count_ahead(trainee: Trainee, questions: Sequence[Question], seeds: Seeds) -> Tensor:
    """Return the tallies of the global batch from a separate forward pass."""
    routers = trainee.routers
    assert routers is not None
    total: Tensor | None = None
    device = trainee.ranks.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        for place, question in enumerate(questions):
            with _recorded(trainee, question, seeds, place):
                trainee.logits(question, **trainee.task.counting)
            total = routers.tallies() if total is None else total + routers.tallies()
    assert total is not None
    return trainee.ranks.sum(total)


def _router_losses(
    trainee: Trainee, tallies: Tensor, share: float, micros: int
) -> router_losses.Contribution:
    """Compute this micro batch's part of the router losses; `tallies` cover the part `share` of the batch."""
    routers = trainee.routers
    assert routers is not None
    return router_losses.contribution(
        routers.outputs,
        routers.read(tallies),
        trainee.run.router,
        share=share,
        parts=micros * trainee.ranks.dp_size,
    )
