"""`upcycle eval`: how well checkpoints do on data they were not trained on, dense or Mixture of Experts.

Images: top-1 accuracy, or the few-shot probe on frozen features. Texts: what the model's task asks (the next
token, spans, masked tokens), its loss in nats and its accuracy per target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from upcycle.checkpoint import read_json
from upcycle.errors import UpcycleError
from upcycle.evaluate.features import features
from upcycle.evaluate.probe import few_shot
from upcycle.nn import models
from upcycle.proof import quiet
from upcycle.subject import Subject
from upcycle.training import tasks
from upcycle.training.examples import Examples
from upcycle.training.images import ImageSet
from upcycle.training.run import Run
from upcycle.training.tasks._tokens import TokenFeed
from upcycle.training.tasks.image_classification import ImageClassification
from upcycle.training.tasks.text_classification import TextClassification


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to evaluate on. `limit` is the number of images or rows at most; 0: all."""

    text: Path | None = None
    images: Path | None = None
    shots: Path | None = None  # images that the probe is fitted on; it is tested on `images`
    per_class: int = 10
    length: int = 512
    batch_size: int = 64
    limit: int = 0
    cache: Path | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.images is None):
            raise UpcycleError("give either --text FILE or --images SET to evaluate on")
        if self.shots is not None and self.images is None:
            raise UpcycleError("--few-shot SET is fitted on that set and tested on --images SET; give both")
        if self.limit < 0:
            raise UpcycleError(f"--limit {self.limit}; it must be 0 (all) or more")
        for name in ("per_class", "length", "batch_size"):
            if getattr(self, name) < 1:
                raise UpcycleError(f"--{name.replace('_', '-')} {getattr(self, name)}; it must be 1 or more")


def evaluate(folder: str | Path, asked: Asked) -> dict[str, Any]:
    """The scores of the checkpoint in `folder`, as JSON has them."""
    folder = Path(folder)
    config = read_json(folder / "config.json", f"{folder} has no config.json; give a folder of a model")
    subject = Subject(folder=folder, config=config)
    task = None if asked.shots else tasks.of(subject.architecture)
    if asked.images and isinstance(task, ImageClassification) is (asked.shots is not None):
        raise UpcycleError(f"{subject.architecture} does not classify images; give --text, or --few-shot")
    if asked.shots and "image_size" not in subject.settings:
        raise UpcycleError(f"{subject.architecture} reads no images; --few-shot is for models that do")
    if asked.text and isinstance(task, TextClassification):
        raise UpcycleError(f"{subject.architecture} classifies texts; score it in a run, with task.test")
    if asked.text and isinstance(task, ImageClassification):
        raise UpcycleError(f"{subject.architecture} reads images and no text; give --images")
    with quiet():
        model = models.open(folder)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    with TemporaryDirectory() as scratch:
        cache = asked.cache or Path(scratch)
        if asked.shots:
            found = {"few_shot": _few_shot(model, subject, asked, cache)}
        else:
            assert task is not None
            found = _score(model.eval(), subject, task, _feed(task, subject, asked, cache), asked)
    return {"checkpoint": str(folder), "architecture": config["architectures"][0], **found}


def _few_shot(model: PreTrainedModel, subject: Subject, asked: Asked, cache: Path) -> dict[str, Any]:
    task = ImageClassification()
    assert asked.shots is not None
    assert asked.images is not None
    sets = [task.images(str(path), subject, cache, any_classes=True) for path in (asked.shots, asked.images)]
    made, labels = [], []
    for images in sets:
        chosen = _chosen(images, asked.limit)
        augment = task.augmentation(subject)
        made.append(features(model, images, chosen, augment, batch_size=asked.batch_size))
        labels.append(images.labels[chosen])
    found = few_shot(
        made[0], labels[0], made[1], labels[1],
        num_classes=max(s.num_labels for s in sets), per_class=asked.per_class,
    )  # fmt: skip
    return {
        "accuracy": found.accuracy_mean,
        "standard_error": found.standard_error,
        "accuracies": list(found.accuracies),
        "per_class": asked.per_class,
        "examples": len(made[1]),
    }


def _chosen(images: ImageSet, limit: int) -> np.ndarray:
    """All images, or as many of them, evenly spaced."""
    count = min(len(images), limit or len(images))
    return np.arange(count) * len(images) // count


def _feed(task: tasks.Task, subject: Subject, asked: Asked, cache: Path) -> TokenFeed | Examples:
    """The rows of what is asked, each once in an epoch."""
    if isinstance(task, ImageClassification):
        images = task.images(str(asked.images), subject, cache)
        return Examples(images, None, held_out_share=0.0, seed=0)
    run = Run.of(
        {
            "source": str(subject.folder),
            "out": str(cache),
            "data": {"sources": [{"path": str(asked.text)}], "cache": str(cache)},
            "train": {"steps": 1, "batch_size": asked.batch_size, "sequence_length": asked.length},
            "schedule": {"peak": 0.0},
        }
    )
    feed = task.feed(run, subject, cache)
    assert isinstance(feed, TokenFeed)
    return feed


@torch.inference_mode()
def _score(
    model: PreTrainedModel,
    subject: Subject,
    task: tasks.Task,
    feed: TokenFeed | Examples,
    asked: Asked,
) -> dict[str, Any]:
    rows = sum(feed.trainable)
    rows = min(rows, asked.limit or rows)
    loss, correct, targets = 0.0, 0, 0
    for start in range(0, rows, asked.batch_size):
        read = feed.next(min(asked.batch_size, rows - start))
        batch = {n: torch.from_numpy(np.ascontiguousarray(a)).to(model.device) for n, a in read.items()}
        question = task.question(batch, subject, training=False)
        logits = model(**question.inputs).logits
        loss += float(task.loss(logits, question.labels))
        correct += int(task.correct(logits, question.labels))
        targets += task.targets(batch)
    accuracy = correct / targets
    return {
        "task": task.name,
        "loss": loss / targets,
        "perplexity": math.exp(min(700.0, loss / targets)),
        "accuracy": accuracy,
        "accuracy_error": math.sqrt(accuracy * (1 - accuracy) / targets),
        "targets": targets,
        "examples": rows,
    }
