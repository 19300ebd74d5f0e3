"""The steps of a run: one is taken, scored and saved; a bad one takes the run back, and a signal ends it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.hf import packing
from upcycle.records.state import RunState
from upcycle.system.signals import held
from upcycle.system.wording import count
from upcycle.training import back, effort, enter, held_out, ledger, metrics, saving, step, together, writers
from upcycle.training.beginning import Ready
from upcycle.training.course import Leg
from upcycle.training.examining import Examiner
from upcycle.training.ledger import Ledger, Rate
from upcycle.training.metrics import Metrics
from upcycle.training.rows import Rows
from upcycle.training.sections import Spikes
from upcycle.training.writers import Writer


def take(ready: Ready, examiner: Examiner | None, out: Path, stop: Sequence[int]) -> RunState:
    """Take the steps of a run that are left; return its state at the end, or after a signal in `stop`."""
    run, here, state = ready.course.run, ready.trainee.ranks, ready.state
    rows = Rows(ready.trainee, ready.feeds, ready.course.after(state.step))
    given = (out, run.log, run.train.total_steps, state.step, run.as_table())
    log = together.by_first(lambda: Metrics(*given), here)
    with ExitStack() as stack:
        if log is not None:
            stack.callback(log.close)
        writer = stack.enter_context(writers.writer(out, run.checkpoint, here))
        stepping = Stepping(ready, rows, writer, log, examiner, out)
        stepping.begin()
        stepping.go_on(stop)
    return stepping.state


@dataclass(frozen=True, kw_only=True)
class Due:
    """The things that follow a step."""

    last: bool  # it is the last step of the run
    stage_ends: bool
    score: bool  # on the held-out rows
    exam: bool  # scores on tasks
    checkpoint: bool

    @property
    def waits(self) -> bool:
        """True if the numbers of the step must be there before the next one is queued."""
        return self.stage_ends or self.score or self.exam or self.checkpoint


class Stepping:
    """A run between two steps: the stage that it is in, the model, and the state after the last step."""

    def __init__(
        self,
        ready: Ready,
        rows: Rows,
        writer: Writer,
        log: Metrics | None,
        examiner: Examiner | None,
        out: Path,
    ) -> None:
        self.state, self.trainee = ready.state, ready.trainee
        self._run, self._course, self._anatomy = ready.course.run, ready.course, ready.anatomy
        self._feeds, self._rows, self._writer = ready.feeds, rows, writer
        self._log, self._examiner, self._out = log, examiner, out
        self._leg = self._course.after(self.state.step)
        self._numbers: dict[int, int] = {}  # of the batches of the steps that are queued
        self._returns: Counter[int] = Counter()  # to each checkpoint
        lag = ledger.lag(self.trainee.ranks.device)
        self._book = Ledger(trainee=self.trainee, rate=self._rate(), log=log, start=None, lag=lag)

    def _rate(self) -> Rate:
        """Return what throughput is worked out from in the stage."""
        trainee, lengths = self.trainee, self.trainee.lengths
        counted = (trainee.start, self._anatomy, self._leg, lengths)
        return Rate(
            flops=effort.flops_per_row(*counted),
            all_scores=effort.flops_per_row(*counted, all_scores=True),
            tokens=sum(lengths.values()),
            peak=metrics.peak_flops(self._run.log, trainee.ranks.device),
            ranks=trainee.ranks,
        )

    def begin(self) -> None:
        """Say what is trained, and score a model that has not been trained yet."""
        begun = self.trainee.start
        active = count(begun.active_parameters)
        self._say(f"{count(begun.parameters)} parameters, {active} active per token")
        self._say(*self.trainee.task.notes(), *self._notes())
        if self.state.step == 0 and self._rows.held_out is not None:
            first = self._book.start = held_out.score(self.trainee, self._rows.held_out)
            self.state = replace(
                self.state,
                held_out_loss=first.loss,
                held_out_start=first.loss,
                held_out_accuracy=first.accuracy,
                held_out_accuracy_start=first.accuracy,
            )
            self._say(f"step 0: {metrics.score(first.loss, first.accuracy)}")

    def go_on(self, stop: Sequence[int]) -> None:
        """Take the steps that are left, until `stop` holds a signal on some rank."""
        if self._owes_an_exam():
            self._examine()
        while self.state.step < self._run.train.total_steps:
            if self.state.step == self._leg.end:
                self._next_stage()
            due = self._due()
            self._queue(stop)
            stopping = self._settle(due)
            if self._book.bad is not None and self._go_back(self._numbers[self._book.bad.step]):
                continue
            self._finish(due, stopping=stopping)
            if stopping and not due.last:
                self._say(f"stopped by SIGTERM after step {self.state.step}; saved, go on with --resume")
                break
            if due.exam:
                self._examine()

    def _next_stage(self) -> None:
        leg = self._course.at(self.state.step)
        self.trainee = enter.next_stage(self.trainee, leg, self._anatomy)
        self._enter(leg)
        self._say(*self._notes())

    def _enter(self, leg: Leg) -> None:
        """Go to the rows and the costs of the stage in which the model is."""
        changed, self._leg = leg != self._leg, leg
        self._rows.enter(leg)
        if changed:
            self._book.enter(self._rate())

    def _due(self) -> Due:
        """Return what follows the next step."""
        run, done = self._run, self.state.step + 1
        last, ends = done == run.train.total_steps, done == self._leg.end
        exam, every = self._exam_follows(done), run.checkpoint.every
        return Due(
            last=last,
            stage_ends=ends,
            score=self._rows.held_out is not None and (ends or done % run.train.eval_every == 0),
            exam=exam,
            checkpoint=exam or (bool(every) and (ends or done % every == 0)),
        )

    def _exam_follows(self, done: int) -> bool:
        """Return whether the model is scored on tasks after so many steps."""
        run = self._run
        return self._examiner is not None and (done == run.train.total_steps or done % run.eval.every == 0)

    def _owes_an_exam(self) -> bool:
        """Return whether the run ended after a step was saved and before its scores on tasks were there."""
        last = None if self._log is None else self._log.last
        here = last is not None and last.step == self.state.step and last.scores is None
        return self._exam_follows(self.state.step) and bool(self.trainee.ranks.share(here))

    def _queue(self, stop: Sequence[int]) -> None:
        """Queue the next step."""
        now, teacher = self.state.step, self.trainee.teacher
        self._book.begin()
        number, arrays = self._rows.next(self.state)
        self._numbers = {s: n for s, n in self._numbers.items() if s + self._book.lag >= now} | {now: number}
        batch = self._rows.on_device(arrays if teacher is None else teacher.beside(arrays))
        lr = self._leg.rate(now)
        self._book.add(step.queue_step(self.trainee, batch, now, lr, stop), lr, self._leg.name)

    def _settle(self, due: Due) -> bool:
        """Write the lines of the steps whose turn it is; return whether a rank was asked to stop."""
        judge = None
        if due.score and self._rows.held_out is not None:
            judge = functools.partial(held_out.score, self.trainee, self._rows.held_out)
        stopping = self._book.settle(wait=due.waits, judge=judge)
        if stopping or self._book.bad is not None:
            self._book.settle(wait=True)
        return stopping

    def _examine(self) -> None:
        """Add the scores on tasks to the line of the last step, which is saved: they may end the run.

        Flash attention takes no float32, so it is asked in 16 bits.
        """
        trainee = self.trainee
        narrow = trainee.autocast() if packing.reads_borders(trainee.model) else nullcontext()
        assert self._examiner is not None
        try:
            with narrow:
                scores = self._examiner.score(trainee.model, self._run, trainee.start.subject, trainee.ranks)
        except UpcycleError as error:
            raise UpcycleError(
                f"step {self.state.step} cannot be scored on tasks: {error}; change [eval], "
                f"or take its tasks out, and go on with --resume"
            ) from error
        if self._log is not None:
            self._log.scored(self.state.step, scores)
        trainee.ranks.barrier()  # whoever asks the folder after the run finds them

    def _go_back(self, harmful: int) -> bool:
        """Go back to the newest checkpoint and leave out batch number `harmful`.

        Returns False if there is no checkpoint; the update was left out, and counts as one that was skipped.
        """
        self._writer.wait()
        checkpoint = self.trainee.ranks.share(saving.latest(self._out))
        if checkpoint is None:
            self._book.bad = None
            return False
        self._book.go_back()
        self.trainee, self.state = back.go(
            self.trainee,
            self._course,
            self._anatomy,
            self._feeds,
            self.state,
            checkpoint,
            harmful,
            self._returns,
        )
        self._enter(self._course.after(self.state.step))
        together.by_first(self._lines_end, self.trainee.ranks)
        self._say(f"the run is back at step {self.state.step} and passes batch {harmful + 1}")
        return True

    def _lines_end(self) -> None:
        """Drop the lines of the steps that are taken again."""
        if self._log is not None:
            self._log.go_back(self.state.step)

    def _finish(self, due: Due, *, stopping: bool) -> None:
        """Take in what the step came to, and save a checkpoint if one is due."""
        done, score = self.state.step + 1, self._book.score
        self.state = replace(self.state, step=done, loss=self._book.loss, batches=self._feeds.state())
        if due.score and score is not None:
            self.state = replace(self.state, held_out_loss=score.loss, held_out_accuracy=score.accuracy)
        must = due.last or stopping
        if due.checkpoint or must:
            self._save(must=must)
        self._report_failures(must=must)

    def _save(self, *, must: bool) -> None:
        """Save a checkpoint; with `must`, return when it is written."""
        recent = None
        if self._run.spikes != Spikes() and self.trainee.recent is not None:
            recent = self.trainee.recent.known()  # what the next steps are judged by
        saved = replace(
            self.state,
            recent=recent,
            identity=self._run.identity(),
            micro_batch=self.trainee.run.train.micro_batch,
            precision=self.trainee.precision,
            layout=asdict(self.trainee.ranks.layout),
        )
        with held():
            self._writer.save(self.trainee.model, self.trainee.optimizer, saved)
            if must:
                self._writer.wait()

    def _report_failures(self, *, must: bool) -> None:
        """Warn about checkpoints that could not be written; with `must`, stop if one is of the last step."""
        for failure in self._writer.failures():
            kept = saving.latest(self._out)
            sentence = (
                f"step {failure.step} could not be saved ({failure.reason}); "
                f"{f'{kept.name} is kept' if kept else 'there is no earlier checkpoint'}"
            )
            if must and failure.step == self.state.step:
                raise UpcycleError(f"{sentence}. Make room in {self._out} and go on with --resume")
            if self._log is not None:
                self._log.warn(f"{sentence}; training goes on")

    def _notes(self) -> list[str]:
        """Return notes for the user about the stage, one sentence each."""
        out = []
        if self._leg.run.data.isolate:
            how = packing.way(self.trainee.model)
            out.append(f"documents in a row do not see each other, {how}")
        if (trained := enter.describe(self._leg, self.trainee.start, self._anatomy)) is not None:
            out.append(trained)
        return out

    def _say(self, *sentences: str) -> None:
        """Tell the user; only the first rank does."""
        for sentence in sentences:
            if self._log is not None:
                self._log.say(sentence)
