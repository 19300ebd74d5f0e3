"""Runs `upcycle train`: reads a run file, writes metrics and checkpoints; can stop and resume at any step."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upcycle.system.signals import interrupting, noted
from upcycle.training import (
    agreement,
    beginning,
    examining,
    parallel,
    recording,
    run_folder,
    saving,
    stepping,
    together,
)
from upcycle.training.examining import Examiner
from upcycle.training.parallel import ranks
from upcycle.training.run import Run


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
    mine = agreement.start_here(run, parallel.world_size())
    task = None if mine.begun is None else beginning.admitted(run, mine.begun)
    with ExitStack() as stack:
        here = stack.enter_context(
            ranks(run.parallel, experts=mine.expert_counts, heads=mine.attention_heads)
        )
        begun = agreement.agreed(mine, here)
        assert task is not None, "ranks agree on a start only if each has one"
        done = [step for step, _ in saving.checkpoints(Path(run.out))] if resume and here.first else []
        if max(here.share(done), default=0) < run.train.total_steps:
            examiner = examining.prepared(run, examiner, begun.subject, here)
        else:
            examiner = examining.asked(run, examiner)
        folders = [opened.folder for opened in begun.checkpoints]
        stack.enter_context(interrupting(signal.SIGTERM))
        checkpoint = stack.enter_context(run_folder.claimed(run, folders, here, resume=resume))
        ready = beginning.ready(run, begun, task, here, checkpoint)
        run, out = ready.course.run, Path(run.out)
        together.by_first(lambda: recording.write(ready, out), here)
        with noted(signal.SIGTERM) as stop:
            state = stepping.take(ready, examiner, out, stop)
    return Result(
        out=out,
        steps=state.step,
        finished=state.step >= run.train.total_steps,
        loss=state.loss,
        held_out_loss=state.held_out_loss,
    )
