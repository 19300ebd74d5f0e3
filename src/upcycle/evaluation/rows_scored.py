"""Scores of every row that a task makes of its data: images, spans of T5, masked tokens of BERT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from upcycle.data.corruption import IGNORED
from upcycle.data.examples import Examples
from upcycle.data.feeding import Feed, Feeding
from upcycle.dense.subject import Subject
from upcycle.evaluation.batch_size import BatchSize
from upcycle.evaluation.differences import Sums
from upcycle.evaluation.no_numbers import refuse_nan
from upcycle.evaluation.results import Metric, Result, data_of
from upcycle.evaluation.text import LENGTH, field_of
from upcycle.evaluation.to_score import ToScore
from upcycle.system import progress
from upcycle.tasks import Task
from upcycle.tasks._labelled import refuse_unnamed
from upcycle.tasks._positions import refuse_beyond_positions

Numbers = list[tuple[float, int, int]]


def score(
    model: PreTrainedModel, subject: Subject, task: Task, path: Path, asked: ToScore, cache: Path
) -> Result:
    """Score the loss and the accuracy per target on the first `asked.limit` rows.

    The rows are in a random order of seed 0. Raises `UpcycleError` for data that the task cannot read, and
    for rows that are longer than the model's positions, and `NoNumbersError` if the model gives NaN.
    """
    length = asked.length or min(LENGTH, subject.positions or LENGTH)
    if task.reads != "images":
        refuse_beyond_positions(length, subject, setting="length")
    feeding = Feeding.of_file(path, length=length, cache=cache, separator=asked.separator, field=asked.field)
    feed = task.feed(feeding, subject)
    if isinstance(feed, Examples):
        refuse_unnamed(feed.examples, subject)
    scored = _score(model, subject, task, feed, asked, f"{_units(task)} of {path.name}")
    settings: dict[str, Any] = {"length": length, "limit": asked.limit, "separator": asked.separator}
    settings |= field_of(asked.field)
    if task.reads == "images":
        settings = {"limit": asked.limit}
    return _result(path, task, scored, settings)


def _units(task: Task) -> str:
    """Return the noun for the rows, in the plural."""
    return f"{task.unit}s" if task.by_example else "rows"


@torch.inference_mode()
def _score(
    model: PreTrainedModel, subject: Subject, task: Task, feed: Feed, asked: ToScore, what: str
) -> np.ndarray:
    """Return the loss, the number of right answers and the number of targets of each row, float64 [3, N]."""
    count = sum(feed.trainable)
    count = min(count, asked.limit or count)
    model.eval()

    def work(places: Any) -> Numbers:
        begun = feed.state()
        try:
            read = feed.next(len(places))
            batch = {n: torch.from_numpy(np.ascontiguousarray(a)).to(model.device) for n, a in read.items()}
            question = task.question(batch, subject, training=False)
            logits = model(**question.inputs).logits
        except (RuntimeError, MemoryError):
            feed.restore(begun)  # repeat the same rows with a smaller batch
            raise
        made = [_row(task, logits[i : i + 1], question.labels[i : i + 1]) for i in range(len(places))]
        refuse_nan(torch.tensor([loss for loss, _, _ in made]), subject)
        return made

    size = BatchSize.of(subject.settings, model.device, fixed=asked.batch_size)
    with progress.work(what, "examples", total=count) as scoring:
        length = asked.length or LENGTH
        found = size.over(range(count), work, length=lambda _: length, advance=scoring.advance)
    return np.array(found, np.float64).T


def _row(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int, int]:
    return float(task.loss(logits, labels)), int(task.correct(logits, labels)), int((labels != IGNORED).sum())


def _result(path: Path, task: Task, scored: np.ndarray, settings: dict[str, Any]) -> Result:
    losses, right, targets = scored
    units, by_token = _units(task), not task.by_example
    loss = Sums(top=losses, bottom=targets, units=units)
    accuracy = Sums(top=right, bottom=targets, units=units)
    return Result(
        kind=task.reads,
        name=path.name,
        data={**data_of(path), **settings},
        metrics={
            "loss": Metric.of(loss, higher_is_better=False, per_token=by_token),
            "accuracy": Metric.of(accuracy, higher_is_better=True, per_token=by_token),
        },
        units=(units, *targets.tolist()),
        more={"task": task.name, "targets": int(targets.sum()), "examples": len(losses)},
    )
