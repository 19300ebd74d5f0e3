"""The few-shot probe on a checkpoint's frozen features, fitted on one set of images and tested on another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from upcycle.cli.console import examples_bar
from upcycle.data.augment import Augment
from upcycle.data.images import ImageSet
from upcycle.dense.subject import Subject
from upcycle.evaluation.asked import Asked
from upcycle.evaluation.batch_size import BatchSize
from upcycle.evaluation.differences import Sums
from upcycle.evaluation.features import features
from upcycle.evaluation.probe import few_shot
from upcycle.evaluation.results import Metric, Result, data_of
from upcycle.tasks.image_classification import ImageClassification


def score(
    model: PreTrainedModel, subject: Subject, shots: Path, images: Path, asked: Asked, cache: Path
) -> Result:
    """The accuracy of probes that are fitted on `shots` and tested on `images`; the seeds are the units."""
    task = ImageClassification()
    sets = [task.images(str(path), subject, cache, any_classes=True) for path in (shots, images)]
    size = BatchSize.of(subject.settings, model.device, fixed=asked.batch_size)
    made, labels = [], []
    for found in sets:
        chosen = _chosen(found, asked.limit)
        augment = task.augmentation(subject)

        def work(places: Sequence[int], found: ImageSet = found, augment: Augment = augment) -> Any:
            return features(model, found, np.array(places), augment, batch_size=len(places))

        with examples_bar(f"features of {Path(found.name).name}") as (advance, set_end):
            set_end(len(chosen))
            made.append(np.stack(size.over(chosen.tolist(), work, advance=advance)))
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
