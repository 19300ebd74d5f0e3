"""Runs `upcycle train`: reads a run file, writes metrics and checkpoints; can stop and resume at any step."""

from __future__ import annotations

import json
import platform
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import upcycle
from upcycle import tasks
from upcycle.conversion.provenance import Hashes
from upcycle.data import stamps
from upcycle.data.feeding import Feed
from upcycle.errors import UpcycleError, listed
from upcycle.loading import attention_heads
from upcycle.records.metrics import StepMetrics
from upcycle.records.run import RunRecord, StartedFrom
from upcycle.records.state import RunState
from upcycle.sharding.layout import Layout
from upcycle.system import memory, progress
from upcycle.system.signals import held, noted
from upcycle.system.wording import count
from upcycle.tasks import Batch, Task
from upcycle.training import fit, metrics, micro_batch, optimizer, routing, run_folder, saving, start, step
from upcycle.training.metrics import Metrics
from upcycle.training.parallel import Ranks, ranks
from upcycle.training.routing import Routers
from upcycle.training.run import Run
from upcycle.training.start import Start
from upcycle.training.step import Outcome, Trainee


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run; losses are the last ones."""

    out: Path
    steps: int
    finished: bool
    loss: float | None
    held_out_loss: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return {**asdict(self), "out": str(self.out)}


def train(run: Run | Mapping[str, Any] | str | Path, *, resume: bool = False) -> Result:
    """Train as `run` says (a `Run`, its table, or its file), on this process or as one of torchrun's.

    `resume` continues from the newest checkpoint of `run.out`, bit for bit on one process, or begins if there
    is none. On SIGTERM, it saves and returns an unfinished result. Raises `UpcycleError` for a mistake of the
    user.
    """
    run = Run.of(run)
    precision = _precision(run)
    begun = start.start_of(run)
    task = tasks.fitting(run.task, begun.dense.architecture)
    fit.refuse_pooling(run, begun.built)
    experts = begun.built.expert_counts if begun.built else set()
    heads = attention_heads(begun.config)
    folders = [opened.folder for opened in begun.checkpoints]
    with (
        ranks(run.parallel, mixed=precision == "mixed", experts=experts, heads=heads) as here,
        noted(signal.SIGTERM) as stop,
        run_folder.claimed(run, folders, here, resume=resume) as checkpoint,
    ):
        before = None if checkpoint is None else saving.read_state(checkpoint)
        _warn(run, begun, task, here, begins=checkpoint is None)
        if here.first and before is not None:
            _say_changed_layout(before, here)
        lengths = task.lengths(run.train.sequence_length, begun.subject)
        run = micro_batch.chosen(run, begun, lengths, here, before, precision=precision)
        out = Path(run.out)
        if here.first:
            feed = task.feed(run.feeding(task), begun.subject)  # the others wait and then find the files
        here.barrier()
        if not here.first:
            feed = task.feed(run.feeding(task), begun.subject)
        if run.train.rows % here.dp_size:
            raise UpcycleError(
                f"a batch is {run.train.rows} rows, which {here.dp_size} data-parallel ranks cannot share "
                f"evenly; change train.batch_tokens or train.batch_size"
            )
        fit.refuse_broken_groups(run, begun.built, lengths, here.dp_size)
        with _sources_kept(begun, here, before) as hashes:
            model = start.model_of(begun, run, here, precision)
        routers = Routers.of(model)
        trainee = Trainee(
            model=model,
            task=task,
            start=begun,
            optimizer=optimizer.make(model, run.optimizer, start.scales(begun, run, model, routers)),
            routers=routers,
            run=run,
            ranks=here,
            precision=precision,
        )
        if run.router.bias_update_rate and trainee.routers:
            trainee.routers.biases()
        state = _begin(trainee, begun, feed, checkpoint, hashes)
        begun.dense.checkpoint.close()
        if here.first:
            _write_record(trainee, out, state)
        return _loop(trainee, feed, state, out, stop)


def _warn(run: Run, begun: Start, task: Task, here: Ranks, *, begins: bool) -> None:
    """Warn the user before a run costs time, and refuse rows that are too long for the model.

    A run that has already trained on such rows only gets a warning.
    """
    long = task.beyond_positions(run.train.sequence_length, begun.subject)
    if long is not None and begins:
        raise UpcycleError(long)
    if here.first:
        found = fit.warnings(run, begun.built) if begins else []
        for sentence in [*found, *filter(None, [long])]:
            progress.warn(sentence)


def _say_changed_layout(before: RunState, here: Ranks) -> None:
    """Say that a run goes on in another world than the one that saved it, which it may."""
    if before.layout is None or dict(before.layout) == asdict(here.layout):
        return
    then = Layout(**before.layout)
    progress.say(
        f"step {before.step} was saved by {then.world} process(es) ({then}); it goes on with {here.world} "
        f"({here.layout})"
    )


@contextmanager
def _sources_kept(begun: Start, here: Ranks, before: RunState | None) -> Iterator[Hashes | None]:
    """Yield the hashes of the files that a run starts from; these must not change while they are read.

    Yields None for a resumed run, which keeps its recorded hashes, and on all ranks but the first.
    """
    if before is not None or not here.first:
        yield None
        return
    files = [file for opened in begun.checkpoints for file in opened.files]
    stamped = stamps.stamps(files)
    yield {opened.label: opened.hashes() for opened in begun.checkpoints}
    if changed := [path for path in stamped if stamps.stamp(Path(path)) != stamped[path]]:
        raise UpcycleError(f"{listed(changed)} changed while it was read; begin again")


def _loop(trainee: Trainee, feed: Feed, state: RunState, out: Path, stop: list[int]) -> Result:
    run, here, begun = trainee.run, trainee.ranks, trainee.start
    total = run.train.total_steps
    held_out = _held_out(run, trainee.task, feed, here.device)
    share = run.train.rows // here.dp_size
    part = slice(here.dp_rank * share, (here.dp_rank + 1) * share)
    log = Metrics(out, run.log, total, state.step, run.as_table()) if here.first else None
    lengths = trainee.lengths
    rate = Rate(
        flops=begun.training_flops_per_row(lengths),
        tokens=sum(lengths.values()),
        peak=metrics.peak_flops(run.log, here.device),
        ranks=here,
    )
    try:
        if log is not None:
            active = count(begun.active_parameters)
            log.say(f"{count(begun.parameters)} parameters, {active} active per token")
            for note in trainee.task.notes():
                log.say(note)
        if state.step == 0 and held_out is not None:
            score = step.evaluate(trainee, held_out)
            state = replace(
                state,
                held_out_loss=score.loss,
                held_out_start=score.loss,
                held_out_accuracy=score.accuracy,
                held_out_accuracy_start=score.accuracy,
            )
            if log is not None:
                log.say(f"step 0: {metrics.score(score.loss, score.accuracy)}")
        while state.step < total:
            now = state.step
            began = time.perf_counter()
            batch = _on(here.device, feed.next(run.train.rows, part))
            lr = run.schedule.at(now, total)
            outcome = step.train_step(trainee, batch, now, lr)
            seconds = time.perf_counter() - began
            state = replace(state, step=now + 1, loss=outcome.loss, batches=feed.state())
            last = now + 1 == total
            record = rate.over(_line(trainee, outcome, now + 1, lr, rate.tokens), run.train.rows, seconds)
            if held_out is not None and (last or (now + 1) % run.train.eval_every == 0):
                score = step.evaluate(trainee, held_out)
                record = replace(record, held_out_loss=score.loss, held_out_accuracy=score.accuracy)
                state = replace(state, held_out_loss=score.loss, held_out_accuracy=score.accuracy)
            if now == 0:
                record = replace(
                    record,
                    held_out_start=state.held_out_start,
                    held_out_accuracy_start=state.held_out_accuracy_start,
                )
            if log is not None:
                log.step(record)
            stopping = here.any(bool(stop))
            due = bool(run.checkpoint.every) and (now + 1) % run.checkpoint.every == 0
            if last or due or stopping:
                _save(trainee, state, out, log, must=last or stopping)
            if stopping and not last:
                if log is not None:
                    log.say(f"stopped by SIGTERM after step {now + 1}; saved, go on with --resume")
                break
    finally:
        if log is not None:
            log.close()
    return Result(
        out=out,
        steps=state.step,
        finished=state.step >= total,
        loss=state.loss,
        held_out_loss=state.held_out_loss,
    )


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


def _line(trainee: Trainee, outcome: Outcome, done: int, lr: float, row_tokens: int) -> StepMetrics:
    """Return the record of a step, without its rates."""
    record = StepMetrics(
        step=done,
        tokens=done * trainee.run.train.rows * row_tokens,
        loss=outcome.loss,
        lr=lr,
        grad_norm=outcome.grad_norm,
    )
    routers = trainee.routers
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


def _save(trainee: Trainee, state: RunState, out: Path, log: Metrics | None, *, must: bool) -> None:
    """Save a checkpoint. A failure stops the run only if `must` is set."""
    keep = trainee.run.checkpoint.keep
    saved = replace(
        state,
        identity=trainee.run.identity(),
        micro_batch=trainee.run.train.micro_batch,
        layout=asdict(trainee.ranks.layout),
    )
    with held():
        optimizer.fill(trainee.optimizer, trainee.run.optimizer)
        reason = saving.save(out, trainee.model, trainee.optimizer, saved, trainee.ranks, keep)
    if reason is None:
        return
    kept = saving.latest(out)
    said = (
        f"step {state.step} could not be saved ({reason}); "
        f"{f'{kept.name} is kept' if kept else 'there is no earlier checkpoint'}"
    )
    if must:
        raise UpcycleError(f"{said}. Make room in {out} and go on with --resume")
    if log is not None:
        log.warn(f"{said}; training goes on")


def _begin(
    trainee: Trainee, begun: Start, feed: Feed, checkpoint: Path | None, hashes: Hashes | None
) -> RunState:
    """Return the state to continue from: the checkpoint's, or step 0."""
    run = trainee.run
    if checkpoint is None:
        if run.optimizer.carry_state:
            stopped = start.carry_state(begun, run, trainee.ranks, trainee.model, trainee.optimizer)
            if trainee.ranks.first and (wrong := run.schedule.continuing(stopped)) is not None:
                progress.warn(wrong)
        return RunState(step=0, batches={}, identity={}, source_sha256=hashes)
    optimizer.fill(trainee.optimizer, run.optimizer)
    saving.load(checkpoint, trainee.model, trainee.optimizer)
    state = saving.read_state(checkpoint)
    feed.restore(dict(state.batches))
    return state


def _write_record(trainee: Trainee, out: Path, state: RunState) -> None:
    """Write run.json, unless this run's is already there."""
    identity = json.loads(json.dumps(trainee.run.identity()))
    try:
        same = run_folder.read_record(out).identity == identity
    except UpcycleError:
        same = False
    if not state.step or not same:
        run_folder.write_record(out, _record(trainee, state))


def _record(trainee: Trainee, state: RunState) -> RunRecord:
    """Return the content of run.json: the description of this run for later readers of its folder."""
    run, begun, task = trainee.run, trainee.start, trainee.task
    lengths = trainee.lengths
    flops = begun.training_flops_per_row(lengths)
    source = begun.dense.checkpoint
    return RunRecord(
        format=RunRecord.FORMAT,
        upcycle_version=upcycle.__version__,
        versions={
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        precision=trainee.precision,
        task=task.name,
        tokens_per_row=sum(lengths.values()),
        training_flops_per_row=flops,
        training_flops_per_token=flops // sum(lengths.values()),
        source=StartedFrom(
            name=source.name, path=str(source.folder.resolve()), model_type=begun.dense.family.model_type
        ),
        blueprint_hash=begun.built.hash if begun.built else None,
        architecture=begun.architecture,
        parameters=begun.parameters,
        active_parameters=begun.active_parameters,
        from_scratch=begun.from_scratch,
        run=run.as_table(),
        identity=run.identity(),
        source_sha256=state.source_sha256,
    )


def _on(device: torch.device, batch: dict[str, np.ndarray]) -> Batch:
    return {name: torch.from_numpy(np.ascontiguousarray(a)).to(device) for name, a in batch.items()}


def _held_out(run: Run, task: Task, feed: Feed, device: torch.device) -> Batch | None:
    """Return the held-out rows: for examples all, unless the run asks for fewer."""
    if not run.train.eval_every:
        return None
    everything = task.by_example and run.train.eval_examples is None
    batch = feed.held_out(None if everything else run.train.eval_rows)
    return _on(device, batch) if len(next(iter(batch.values()))) else None


def _precision(run: Run) -> str:
    """Return the precision; `auto` is mixed on an accelerator and float32 on a CPU."""
    if run.train.precision != "auto":
        return run.train.precision
    return "mixed" if torch.accelerator.is_available() else "float32"
