"""Writes the line of every step. On an accelerator it reads a step's numbers while the next one is queued."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from upcycle.errors import UpcycleError
from upcycle.records.metrics import StepMetrics
from upcycle.system import memory
from upcycle.system.wording import count
from upcycle.training import routing
from upcycle.training.held_out import Score
from upcycle.training.metrics import Metrics
from upcycle.training.outcome import Outcome, Queued
from upcycle.training.parallel import Ranks
from upcycle.training.spikes import Pace
from upcycle.training.trainee import Trainee


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Throughput of training: tokens and active FLOPs per second, MFU, and peak memory.

    MFU counts all attention scores, as that of papers and forecasts does.
    """

    flops: int  # FLOPs of training on one row
    all_scores: int  # the same with both halves of the scores of causal attention
    tokens: int  # number of tokens in a row
    peak: float | None  # FLOP/s of one device
    ranks: Ranks

    def over(self, record: StepMetrics, rows: int, seconds: float) -> StepMetrics:
        """Return the record of a step with its rates."""
        return replace(
            record,
            seconds=round(seconds, 6),
            tokens_per_s=round(rows * self.tokens / seconds, 1),
            active_flops_per_s=round(rows * self.flops / seconds),
            mfu=None if self.peak is None else self._utilisation(rows / seconds),
            peak_memory=self._memory(),
        )

    def _utilisation(self, rows_per_s: float) -> float:
        assert self.peak is not None
        return round(rows_per_s * self.all_scores / (self.peak * self.ranks.world), 5)

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
    bad: Queued | None = None  # the first step because of which the run has to go back
    _row: int = 0  # steps in a row that were skipped
    _pace: Pace | None = None
    _queue: deque[tuple[Queued, float, str | None]] = field(default_factory=deque)
    _clock: float = field(default_factory=time.perf_counter)

    def enter(self, rate: Rate) -> None:
        """Go to another stage, and measure its pace anew."""
        self.rate, self._pace = rate, None

    def begin(self) -> None:
        """Start the clock of the next step now, unless another step is still on its way."""
        if not self._queue:
            self._clock = time.perf_counter()

    def add(self, queued: Queued, lr: float, stage: str | None = None) -> None:
        """Take a step that was just queued, and the name of its stage, if the run has stages."""
        self._queue.append((queued, lr, stage))

    def settle(self, *, wait: bool, judge: Callable[[], Score] | None = None) -> bool:
        """Write the lines of the steps whose turn it is; with `wait`, of all.

        `judge` scores the model for the line of the last of them. Returns whether a rank was asked to stop.
        Raises `UpcycleError` if the loss or a gradient of such a step was not finite.
        """
        stopping = False
        while len(self._queue) > (0 if wait else self.lag):
            queued, lr, stage = self._queue.popleft()
            outcome = queued.outcome()
            arrived = time.perf_counter()
            record = replace(self._record(queued.step + 1, outcome, lr, arrived - self._clock), stage=stage)
            self._clock = arrived
            if judge is not None and not self._queue:
                self.score = judge()
                record = replace(record, held_out_loss=self.score.loss, held_out_accuracy=self.score.accuracy)
                self.begin()
            if outcome.finite:
                self.loss = outcome.loss
            record = replace(record, skipped=self._noticed(queued, outcome))
            stopping = stopping or outcome.stopping
            if self.log is not None:
                self.log.step(record)
                self._say_slow(record)
        return stopping

    def go_back(self) -> None:
        """Forget the steps that are queued: the run goes back to a checkpoint."""
        self._queue.clear()
        self.bad, self._row = None, 0

    def _noticed(self, queued: Queued, outcome: Outcome) -> str | None:
        """Say that a step stands out or is not finite; return why its update was skipped, or None.

        Raises `UpcycleError` if too many in a row were skipped.
        """
        spikes = queued.spikes
        skipped = outcome.skipped(spikes)
        self._row = self._row + 1 if skipped else 0
        if outcome.rolls_back(spikes) and self.bad is None:
            self.bad = queued
        if self._row > spikes.most:
            raise UpcycleError(
                f"step {queued.step + 1}: {outcome.what()}, and {self._row} steps in a row were skipped "
                f"(spikes.most = {spikes.most}); the last checkpoint is kept; lower schedule.peak, or look "
                f"at the data"
            )
        if self.log is not None and (skipped or outcome.stands_out):
            then = "; the weights were not updated" if skipped else ""
            self.log.warn(f"step {queued.step + 1}: {outcome.what()}{then}")
        return None if not skipped else "not finite" if not outcome.finite else "stands out"

    def _say_slow(self, record: StepMetrics) -> None:
        """Warn that training has become slow."""
        assert self.log is not None
        self._pace = self._pace or Pace(least=self.log.log.slow)
        if record.tokens_per_s and (found := self._pace.falls(record.tokens_per_s)) is not None:
            now, usual = map(count, found)
            self.log.warn(f"step {record.step}: training has become slow, {now} tokens/s instead of {usual}")

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
