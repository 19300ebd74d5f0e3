"""The few-shot probe on a checkpoint's frozen features, fitted on one set of images and tested on another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from upcycle.data import leaks
from upcycle.data.augment import Augment
from upcycle.data.documents import Source
from upcycle.data.images import ImageSet
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.evaluation.batch_size import BatchSize
from upcycle.evaluation.differences import Sums
from upcycle.evaluation.features import features
from upcycle.evaluation.probe import few_shot
from upcycle.evaluation.results import Metric, Result, data_of
from upcycle.evaluation.to_score import ToScore
from upcycle.system import progress
from upcycle.tasks._labelled import as_fitted
from upcycle.tasks.image_classification import ImageClassification


def refuse_shared(shots: Path, images: Path) -> None:
    """Raise `UpcycleError` if a probe would be tested on images that it may be fitted on."""
    file = leaks.shared(Source(path=str(shots)), Source(path=str(images)))
    if file is not None:
        raise UpcycleError(
            f"--few-shot {shots} and --images {images} both have {file.name}, and a probe is not tested on "
            f"what it is fitted on; give two sets that share no file"
        )


def score(
    model: PreTrainedModel, subject: Subject, shots: Path, images: Path, asked: ToScore, cache: Path
) -> Result:
    """Return the accuracy of probes fitted on `shots` and tested on `images`; the units are the seeds."""
    task = ImageClassification()
    fitted_on, tested_on = (
        task.images(str(path), subject, cache, any_classes=True) for path in (shots, images)
    )
    sets = (fitted_on, as_fitted(tested_on, fitted_on))
    size = BatchSize.of(subject.settings, model.device, fixed=asked.batch_size)
    fit, test = (_seen(model, found, task.augmentation(subject), size, asked.limit) for found in sets)
    fitted = few_shot(*fit, *test, num_classes=fitted_on.num_labels, per_class=asked.per_class)
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
        units=(asked.per_class, *test[1].tolist()),
        more={
            "accuracies": list(fitted.accuracies),
            "per_class": asked.per_class,
            "examples": len(test[0]),
        },
    )


def _seen(
    model: PreTrainedModel, images: ImageSet, augment: Augment, size: BatchSize, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return features, float32 [N, D], and labels, int64 [N], of at most `limit` images (0: all)."""
    chosen = _chosen(images, limit)

    def work(places: Sequence[int]) -> Any:
        return features(model, images, np.array(places), augment, batch_size=len(places))

    with progress.work(f"features of {Path(images.name).name}", "examples") as reading:
        reading.total(len(chosen))
        found: np.ndarray = np.stack(size.over(chosen.tolist(), work, advance=reading.advance))
    return found, images.labels[chosen]


def _chosen(images: ImageSet, limit: int) -> np.ndarray:
    """Return the numbers of all images, or of `limit` evenly spaced ones."""
    count = min(len(images), limit or len(images))
    return np.arange(count) * len(images) // count
