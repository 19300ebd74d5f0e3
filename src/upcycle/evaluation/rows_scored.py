"""Rows of what a model's task asks, each scored by itself: images and their classes, T5's spans, BERT's
masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from upcycle import tasks
from upcycle.data.augment import Augment
from upcycle.data.corruption import IGNORED
from upcycle.data.examples import Examples
from upcycle.data.images import ImageSet
from upcycle.dense.subject import Subject
from upcycle.evaluation.asked import Asked
from upcycle.evaluation.batch_size import BatchSize
from upcycle.evaluation.differences import Sums
from upcycle.evaluation.features import features
from upcycle.evaluation.probe import few_shot
from upcycle.evaluation.results import Metric, Result, data_of
from upcycle.evaluation.text import LENGTH
from upcycle.system import progress
from upcycle.tasks._tokens import TokenFeed
from upcycle.tasks.image_classification import ImageClassification
from upcycle.training.run import Run

Numbers = list[tuple[float, int, int]]


def of_images(model: PreTrainedModel, subject: Subject, path: Path, asked: Asked, cache: Path) -> Result:
    """Top-1 accuracy and loss on labelled images, the first `asked.limit` of an order keyed by seed 0."""
    task = ImageClassification()
    feed = Examples(task.images(str(path), subject, cache), None, held_out_share=0.0, seed=0)
    scored = _score(model, subject, task, feed, asked, f"images of {path.name}")
    return _result("images", path, task, scored, "images", {"limit": asked.limit})


def of_text(
    model: PreTrainedModel, subject: Subject, path: Path, task: tasks.Task, asked: Asked, cache: Path
) -> Result:
    """The loss of a task that hides parts of a text, per part hidden; the rows are packed ones."""
    length = asked.length or min(LENGTH, subject.settings.get("max_position_embeddings") or LENGTH)
    run = Run.of(
        {
            "source": str(subject.folder),
            "out": str(cache),
            "data": {"sources": [{"path": str(path), **_separated(asked)}], "cache": str(cache)},
            "train": {"steps": 1, "batch_size": 1, "sequence_length": length},
            "schedule": {"peak": 0.0},
        }
    )
    feed = task.feed(run, subject, cache)
    assert isinstance(feed, TokenFeed)
    scored = _score(model, subject, task, feed, asked, f"rows of {path.name}")
    settings = {"length": length, "limit": asked.limit, "separator": asked.separator}
    return _result("text", path, task, scored, "rows", settings)


def _separated(asked: Asked) -> dict[str, str]:
    return {} if asked.separator is None else {"separator": asked.separator}


@torch.inference_mode()
def _score(
    model: PreTrainedModel,
    subject: Subject,
    task: tasks.Task,
    feed: TokenFeed | Examples,
    asked: Asked,
    what: str,
) -> np.ndarray:
    """Loss, right answers and targets of each row: float64 [3, N]."""
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
            feed.restore(begun)  # the same rows come again, fewer at a time
            raise
        return [_row(task, logits[i : i + 1], question.labels[i : i + 1]) for i in range(len(places))]

    size = BatchSize.of(subject.settings, model.device, fixed=asked.batch_size)
    with progress.work(what, "examples", total=count) as scoring:
        length = asked.length or LENGTH
        found = size.over(range(count), work, length=lambda _: length, advance=scoring.advance)
    return np.array(found, np.float64).T


def _row(task: tasks.Task, logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int, int]:
    return float(task.loss(logits, labels)), int(task.correct(logits, labels)), int((labels != IGNORED).sum())


def _result(
    kind: Any, path: Path, task: tasks.Task, scored: np.ndarray, units: str, settings: dict[str, Any]
) -> Result:
    losses, right, targets = scored
    loss = Sums(top=losses, bottom=targets, units=units)
    accuracy = Sums(top=right, bottom=targets, units=units)
    by_token = kind == "text"
    return Result(
        kind=kind,
        name=path.name,
        data={**data_of(path), **settings},
        metrics={
            "loss": Metric.of(loss, higher_is_better=False, per_token=by_token),
            "accuracy": Metric.of(accuracy, higher_is_better=True, per_token=by_token),
        },
        units=(units, *targets.tolist()),
        more={"task": task.name, "targets": int(targets.sum()), "examples": len(losses)},
    )


def of_probe(
    model: PreTrainedModel, subject: Subject, shots: Path, images: Path, asked: Asked, cache: Path
) -> Result:
    """The few-shot probe on frozen features, fitted on `shots`, tested on `images`; its seeds are units."""
    task = ImageClassification()
    sets = [task.images(str(path), subject, cache, any_classes=True) for path in (shots, images)]
    size = BatchSize.of(subject.settings, model.device, fixed=asked.batch_size)
    made, labels = [], []
    for found in sets:
        chosen = _chosen(found, asked.limit)
        augment = task.augmentation(subject)

        def work(places: Sequence[int], found: ImageSet = found, augment: Augment = augment) -> Any:
            return features(model, found, np.array(places), augment, batch_size=len(places))

        what = f"features of {Path(found.name).name}"
        with progress.work(what, "examples", total=len(chosen)) as reading:
            made.append(np.stack(size.over(chosen.tolist(), work, advance=reading.advance)))
        labels.append(found.labels[chosen])
    fitted = few_shot(
        made[0], labels[0], made[1], labels[1],
        num_classes=max(s.num_labels for s in sets), per_class=asked.per_class,
    )  # fmt: skip
    sums = Sums.mean(np.array(fitted.accuracies), "seeds")
    return Result(
        kind="few_shot",
        name=images.name,
        data={
            "fitted_on": data_of(shots),
            "tested_on": data_of(images),
            "per_class": asked.per_class,
            "limit": asked.limit,
        },
        metrics={"accuracy": Metric.of(sums, higher_is_better=True)},
        units=(asked.per_class, *labels[1].tolist()),
        more={
            "accuracies": list(fitted.accuracies),
            "per_class": asked.per_class,
            "examples": len(made[1]),
        },
    )


def _chosen(images: ImageSet, limit: int) -> np.ndarray:
    """All images, or as many of them, evenly spaced."""
    count = min(len(images), limit or len(images))
    return np.arange(count) * len(images) // count
