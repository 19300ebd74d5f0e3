"""Writes the line of every step. On an accelerator it reads a step's numbers while the next one is queued."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from upcycle.records.metrics import StepMetrics
from upcycle.system import memory
from upcycle.training import routing
from upcycle.training.metrics import Metrics
from upcycle.training.parallel import Ranks
from upcycle.training.step import Outcome, Queued, Score, Trainee


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Throughput of training: tokens and active FLOPs per second, MFU, and peak memory."""

    flops: int  # FLOPs of training on one row
    tokens: int  # number of tokens in a row
    peak: float | None  # FLOP/s of one device
    ranks: Ranks

    def over(self, record: StepMetrics, rows: int, seconds: float) -> StepMetrics:
        """Return the record of a step with its rates."""
        speed = rows * self.flops / seconds
        return replace(
            record,
            seconds=round(seconds, 6),
            tokens_per_s=round(rows * self.tokens / seconds, 1),
            active_flops_per_s=round(speed),
            mfu=None if self.peak is None else round(speed / (self.peak * self.ranks.world), 5),
            peak_memory=self._memory(),
        )

    def _memory(self) -> int:
        """Return the peak memory in bytes of this rank's accelerator, or of its process on a CPU."""
        device = self.ranks.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory.peak()


def lag(device: torch.device) -> int:
    """Return how many steps may be queued behind the one whose numbers are read; a CPU queues nothing."""
    return 0 if device.type == "cpu" else 1


@dataclass(kw_only=True)
class Ledger:
    """The steps of a run that are queued, and the lines of those that are done.

    `seconds` of a step are from the arrival of the numbers of the step before to that of its own. `begin`
    starts this clock again after work that belongs to no step.
    """

    trainee: Trainee
    rate: Rate
    log: Metrics | None
    start: Score | None  # the score before the first step
    lag: int
    loss: float | None = None  # of the newest step that was read
    score: Score | None = None  # the newest one
    _queue: deque[tuple[Queued, float]] = field(default_factory=deque)
    _clock: float = field(default_factory=time.perf_counter)

    def begin(self) -> None:
        """Start the clock of the next step now, unless another step is still on its way."""
        if not self._queue:
            self._clock = time.perf_counter()

    def add(self, queued: Queued, lr: float) -> None:
        """Take a step that was just queued."""
        self._queue.append((queued, lr))

    def settle(self, *, wait: bool, judge: Callable[[], Score] | None = None) -> bool:
        """Write the lines of the steps whose turn it is; with `wait`, of all.

        `judge` scores the model for the line of the last of them. Returns whether a rank was asked to stop.
        Raises `UpcycleError` if the loss or a gradient of such a step was not finite.
        """
        stopping = False
        while len(self._queue) > (0 if wait else self.lag):
            queued, lr = self._queue.popleft()
            outcome = queued.outcome()
            arrived = time.perf_counter()
            record = self._record(queued.step + 1, outcome, lr, arrived - self._clock)
            self._clock = arrived
            if judge is not None and not self._queue:
                self.score = judge()
                record = replace(record, held_out_loss=self.score.loss, held_out_accuracy=self.score.accuracy)
                self.begin()
            self.loss = outcome.loss
            stopping = stopping or outcome.stopping
            if self.log is not None:
                self.log.step(record)
        return stopping

    def _record(self, done: int, outcome: Outcome, lr: float, seconds: float) -> StepMetrics:
        """Return the record of a step with its rates."""
        rows = self.trainee.run.train.rows
        record = StepMetrics(
            step=done,
            tokens=done * rows * self.rate.tokens,
            loss=outcome.loss,
            lr=lr,
            grad_norm=outcome.grad_norm,
            divergence=outcome.divergence,
        )
        if done == 1 and self.start is not None:
            record = replace(
                record, held_out_start=self.start.loss, held_out_accuracy_start=self.start.accuracy
            )
        return self.rate.over(self._routed(record, outcome), rows, seconds)

    def _routed(self, record: StepMetrics, outcome: Outcome) -> StepMetrics:
        """Return the record with the routers' numbers."""
        routers = self.trainee.routers
        if not outcome.tallies or routers is None:
            return record
        rows = zip(routers.layers, routers.stacks, outcome.tallies, outcome.router_grad_norms, strict=True)
        layers = tuple(
            replace(routing.health(tally, stack, layer), router_grad_norm=norm)
            for layer, stack, tally, norm in rows
        )
        return replace(
            record,
            balance_loss=outcome.balance_loss,
            z_loss=outcome.z_loss,
            router_losses=dict(outcome.own_losses) or None,
            layers=layers,
        )
