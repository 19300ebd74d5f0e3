"""Runs `upcycle train`: reads a run file, writes metrics and checkpoints; can stop and resume at any step."""

from __future__ import annotations

import functools
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from upcycle import tasks
from upcycle.conversion.provenance import Hashes
from upcycle.data import stamps
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError, listed
from upcycle.hf import packing
from upcycle.records.state import RunState
from upcycle.sharding.layout import Layout
from upcycle.system import progress
from upcycle.system.signals import held, interrupting, noted
from upcycle.system.wording import count
from upcycle.tasks import Task
from upcycle.training import (
    agreement,
    back,
    enter,
    fit,
    ledger,
    metrics,
    micro_batch,
    parallel,
    recording,
    run_folder,
    saving,
    start,
    step,
    teacher,
    writers,
)
from upcycle.training.anatomy import Anatomy
from upcycle.training.course import Course, Leg
from upcycle.training.examining import Examiner, examiner_of
from upcycle.training.feeds import Feeds
from upcycle.training.ledger import Ledger, Rate
from upcycle.training.metrics import Metrics
from upcycle.training.parallel import Ranks, ranks
from upcycle.training.routing import Routers
from upcycle.training.rows import Rows
from upcycle.training.run import Run, Spikes
from upcycle.training.start import Start
from upcycle.training.step import Score, Trainee
from upcycle.training.writers import Failure, Writer


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


def train(
    run: Run | Mapping[str, Any] | str | Path, *, resume: bool = False, examiner: Examiner | None = None
) -> Result:
    """Train as `run` says (a `Run`, its table, or its file), on this process or as one of torchrun's.

    `resume` continues from the newest checkpoint of `run.out`, bit for bit on one process, or begins if there
    is none. On SIGTERM, it saves and returns an unfinished result; before its first step there is nothing to
    save, and SIGTERM does what Ctrl-C does. Raises `UpcycleError` for a mistake of the user.
    """
    run = Run.of(run)
    precision = fit.precision(run)
    mine = agreement.found(run, parallel.world_size())
    if mine.begun is not None:
        task = tasks.fitting(run.task, Subject.of_dense(mine.begun.dense).architecture)
        for leg in Course(run).legs:
            fit.refuse_pooling(leg.run, mine.begun.built)
            fit.refuse_isolation(leg.run, task, mine.begun.subject)
            teacher.refuse_other(leg.run, task, mine.begun.subject, mine.begun.teacher)
    with ExitStack() as stack:
        here = stack.enter_context(
            ranks(
                run.parallel,
                mixed=precision == "mixed",
                experts=mine.expert_counts,
                heads=mine.attention_heads,
            )
        )
        begun = agreement.agreed(mine, here)
        examiner = examiner_of(run, examiner, begun.subject, here.world)
        folders = [opened.folder for opened in begun.checkpoints]
        stack.enter_context(interrupting(signal.SIGTERM))
        checkpoint = stack.enter_context(run_folder.claimed(run, folders, here, resume=resume))
        before = None if checkpoint is None else saving.read_state(checkpoint)
        _warn(run, begun, task, here, begins=checkpoint is None)
        if here.first and before is not None:
            _say_changed_layout(before, here)
        _refuse_other_teacher(before, begun, here)
        lengths = task.lengths(run.train.sequence_length, begun.subject)
        run = run_folder.settled(run, checkpoint)
        run = micro_batch.chosen(run, begun, lengths, here, before, precision=precision)
        course, out = Course(run), Path(run.out)
        if here.first:
            feeds = _feeds(course, task, begun)  # the others wait and then find the files
        here.barrier()
        if not here.first:
            feeds = _feeds(course, task, begun)
        fit.refuse_uneven_rows(run, here.dp_size)
        fit.refuse_broken_groups(run, begun.built, lengths, here.dp_size)
        with _sources_kept(begun, here, before) as hashes:
            model = start.model_of(begun, run, here, precision)
        routers = Routers.of(model)
        anatomy = enter.anatomy_of(course, begun, model, routers)
        if routers and any(leg.run.router.bias_update_rate for leg in course.legs):
            routers.biases()
        trainee = enter.first(
            course.after(0 if before is None else before.step),
            model=model,
            task=task,
            begun=begun,
            routers=routers,
            here=here,
            precision=precision,
            anatomy=anatomy,
        )
        state = _begin(trainee, begun, feeds, checkpoint, hashes)
        feed, left = feeds.of(course.after(state.step)), run.train.total_steps - state.step
        taught = teacher.teaching(run, begun, task, feed, here, precision=precision, steps=left)
        trainee = replace(trainee, teacher=taught)
        for opened in begun.checkpoints:
            opened.close()
        if here.first:
            recording.write(trainee, run, out, state)
        with noted(signal.SIGTERM) as stop:
            return _loop(trainee, course, anatomy, feeds, examiner, state, out, stop)


def _feeds(course: Course, task: Task, begun: Start) -> Feeds:
    return Feeds(course, lambda run: task.feed(run.feeding(task), begun.subject))


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


def _refuse_other_teacher(before: RunState | None, begun: Start, here: Ranks) -> None:
    """Refuse to go on with a teacher that has changed: it is read again, unlike what the model came from."""
    if before is None or before.source_sha256 is None or begun.teacher is None:
        return
    checkpoint = begun.teacher.checkpoint
    then = before.source_sha256.get(checkpoint.label)
    now = here.share(dict(checkpoint.hashes()) if here.first else None)
    if now != then:
        raise UpcycleError(
            f"the teacher {checkpoint.name} has changed since step {before.step} was saved; put it back as "
            f"it was, or start a new run"
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


def _loop(
    trainee: Trainee,
    course: Course,
    anatomy: Anatomy | None,
    feeds: Feeds,
    examiner: Examiner | None,
    state: RunState,
    out: Path,
    stop: list[int],
) -> Result:
    run, here, begun = course.run, trainee.ranks, trainee.start
    total = run.train.total_steps
    leg = course.after(state.step)
    rows = Rows(run, trainee.task, feeds, here, leg)
    log = Metrics(out, run.log, total, state.step, run.as_table()) if here.first else None
    lengths = trainee.lengths
    rate = Rate(
        flops=begun.training_flops_per_row(lengths),
        tokens=sum(lengths.values()),
        peak=metrics.peak_flops(run.log, here.device),
        ranks=here,
    )
    with ExitStack() as stack:
        if log is not None:
            stack.callback(log.close)
        writer = stack.enter_context(writers.writer(out, run.checkpoint, here))
        if log is not None:
            active = count(begun.active_parameters)
            log.say(f"{count(begun.parameters)} parameters, {active} active per token")
            for note in [*trainee.task.notes(), *_notes(trainee, leg, anatomy)]:
                log.say(note)
        first: Score | None = None
        if state.step == 0 and rows.held_out is not None:
            first = step.evaluate(trainee, rows.held_out)
            state = _scored_at_first(state, first)
            if log is not None:
                log.say(f"step 0: {metrics.score(first.loss, first.accuracy)}")
        numbers: dict[int, int] = {}  # of the batches of the steps that are queued
        returns: Counter[int] = Counter()  # to each checkpoint
        book = Ledger(
            trainee=trainee,
            rate=rate,
            log=log,
            start=first,
            lag=ledger.lag(here.device),
        )
        while state.step < total:
            now = state.step
            if now == leg.end:
                leg = course.at(now)
                trainee = enter.next_stage(trainee, leg, anatomy)
                rows.enter(leg)
                if log is not None:
                    for note in _notes(trainee, leg, anatomy):
                        log.say(note)
            book.begin()
            number, arrays = rows.next(state)
            numbers = {s: n for s, n in numbers.items() if s + book.lag >= now} | {now: number}
            batch = rows.on_device(arrays if trainee.teacher is None else trainee.teacher.beside(arrays))
            lr = leg.rate(now)
            book.add(step.queue_step(trainee, batch, now, lr, stop), lr, leg.name)
            last, ends = now + 1 == total, now + 1 == leg.end
            judged = rows.held_out is not None and (ends or (now + 1) % run.train.eval_every == 0)
            due = bool(run.checkpoint.every) and (ends or (now + 1) % run.checkpoint.every == 0)
            examined = examiner is not None and (last or (now + 1) % run.eval.every == 0)
            stopping = book.settle(
                wait=ends or judged or due or examined,
                judge=functools.partial(step.evaluate, trainee, rows.held_out)
                if judged and rows.held_out
                else None,
                examine=functools.partial(examiner.score, trainee.model, run, begun.subject)
                if examiner is not None and examined
                else None,
            )
            if stopping:
                book.settle(wait=True)
            if book.bad is not None:
                harmful = numbers[book.bad.step]
                book.settle(wait=True)
                writer.wait()
                checkpoint = here.share(saving.latest(out))
                book.go_back()
                if checkpoint is not None:  # else the update was left out, and that is all that can be done
                    trainee, state = back.go(
                        trainee, course, anatomy, feeds, state, checkpoint, harmful, returns
                    )
                    leg = course.after(state.step)
                    rows.enter(leg)
                    if log is not None:
                        log.go_back(state.step)
                        log.say(f"the run is back at step {state.step} and passes batch {harmful + 1}")
                    continue
            state = replace(state, step=now + 1, loss=book.loss, batches=feeds.state())
            if judged and book.score is not None:
                state = replace(state, held_out_loss=book.score.loss, held_out_accuracy=book.score.accuracy)
            must = last or stopping
            if due or must:
                _save(trainee, run, state, writer, must=must)
            _report(writer.failures(), out, log, must=state.step if must else None)
            if stopping and not last:
                if log is not None:
                    log.say(f"stopped by SIGTERM after step {now + 1}; saved, go on with --resume")
                break
    return Result(
        out=out,
        steps=state.step,
        finished=state.step >= total,
        loss=state.loss,
        held_out_loss=state.held_out_loss,
    )


def _scored_at_first(state: RunState, first: Score) -> RunState:
    """Return the state at step 0 with the score before any training."""
    return replace(
        state,
        held_out_loss=first.loss,
        held_out_start=first.loss,
        held_out_accuracy=first.accuracy,
        held_out_accuracy_start=first.accuracy,
    )


def _notes(trainee: Trainee, leg: Leg, anatomy: Anatomy | None) -> list[str]:
    """Return notes for the user about a stage that begins or goes on, one sentence each."""
    out = []
    if leg.run.data.isolate:
        how = packing.attention(trainee.model)
        out.append(f"documents in a row do not see each other, by masks for {how}")
    if (said := enter.describe(leg, trainee.start, anatomy)) is not None:
        out.append(said)
    return out


def _save(trainee: Trainee, run: Run, state: RunState, writer: Writer, *, must: bool) -> None:
    """Save a checkpoint of `run`; with `must`, return when it is written."""
    recent = None
    if run.spikes != Spikes() and trainee.recent is not None:
        recent = trainee.recent.known()  # what the next steps are judged by
    saved = replace(
        state,
        recent=recent,
        identity=run.identity(),
        micro_batch=trainee.run.train.micro_batch,
        layout=asdict(trainee.ranks.layout),
    )
    with held():
        writer.save(trainee.model, trainee.optimizer, saved)
        if must:
            writer.wait()


def _report(failures: Sequence[Failure], out: Path, log: Metrics | None, *, must: int | None) -> None:
    """Warn about checkpoints that could not be written; stop the run if one is that of step `must`."""
    for failure in failures:
        kept = saving.latest(out)
        said = (
            f"step {failure.step} could not be saved ({failure.reason}); "
            f"{f'{kept.name} is kept' if kept else 'there is no earlier checkpoint'}"
        )
        if failure.step == must:
            raise UpcycleError(f"{said}. Make room in {out} and go on with --resume")
        if log is not None:
            log.warn(f"{said}; training goes on")


def _begin(
    trainee: Trainee, begun: Start, feeds: Feeds, checkpoint: Path | None, hashes: Hashes | None
) -> RunState:
    """Return the state to continue from: the checkpoint's, or step 0."""
    run = trainee.run
    if checkpoint is None:
        if run.optimizer.carry_state:
            stopped = start.carry_state(begun, run, trainee.ranks, trainee.model, trainee.optimizer)
            if trainee.ranks.first and (wrong := run.schedule.continuing(stopped)) is not None:
                progress.warn(wrong)
        return RunState(step=0, batches={}, identity={}, source_sha256=hashes)
    return back.restore(trainee, feeds, checkpoint)
