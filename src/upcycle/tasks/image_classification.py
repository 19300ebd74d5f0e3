"""Image classification: predict the class of an image."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.data.augment import Augment
from upcycle.data.corpus import Data
from upcycle.data.documents import Source
from upcycle.data.examples import Examples
from upcycle.data.feeding import Feed, Feeding
from upcycle.data.image_processor import ImageProcessor
from upcycle.data.images import ImageSet
from upcycle.errors import listed
from upcycle.families._encoder import pair
from upcycle.system import progress
from upcycle.tasks import Batch, Question, Task
from upcycle.tasks._labelled import as_the_head, objection_to, only_source, split

if TYPE_CHECKING:
    from upcycle.dense.subject import Subject


@dataclass(frozen=True, kw_only=True)
class ImageClassification(Task):
    """Images from one source: a parquet file, a folder of them, or a folder with one subfolder per class.

    The model is scored on the set `test`; without it, on the share `data.held_out` of the images.
    `[task.augment]` sets the augmentation. The model decides size and channels.
    """

    by_example = True
    splits = True
    unit = "image"
    reads = "images"
    cache_name = "images"
    summary = "the class of an image"
    heads = ("ForImageClassification", "ForImageClassificationWithTeacher")
    auto = "AutoModelForImageClassification"

    test: str | None = None  # the set to score on; none: data.held_out of the images
    image_field: str = "image"  # column of the images in parquet
    label_field: str = "label"  # column of the labels in parquet
    augment: Augment = field(default_factory=Augment)  # random changes of training images: [task.augment]

    def notes(self) -> list[str]:
        if not self.augment.flip:
            return []
        return [
            f"images are mirrored left to right with a chance of {self.augment.flip:g} (task.augment.flip); "
            f"set it to 0 where that makes another thing of them, as of digits and letters"
        ]

    def feed(self, feeding: Feeding, subject: Subject) -> Feed:
        source = only_source(feeding, self).path
        train = self.images(source, subject, feeding.cache)
        test = None if self.test is None else self.images(self.test, subject, feeding.cache)
        return split(train, test, feeding)

    def objection(self, data: Data) -> str | None:
        test = None if self.test is None else Source(path=self.test)
        return objection_to(data, self, test, ("field", "separator", "split", "append_eos", "tokenizer"))

    def shown(self, feeding: Feeding, subject: Subject, *, labels: bool) -> Feed:
        images = self.images(only_source(feeding, self).path, subject, feeding.cache, any_classes=not labels)
        return Examples(images, None, held_out_share=0.0, seed=feeding.seed)

    def images(self, path: str, subject: Subject, cache: Path, *, any_classes: bool = False) -> ImageSet:
        """Open a set of images at the model's size; its classes must be the model's unless `any_classes`."""
        config, processor = subject.settings, _processor(subject)
        size = pair(config["image_size"])
        if (sentence := processor.warning(size)) is not None:
            _warn_once(sentence)
        found = ImageSet.open(
            path,
            size=size,
            channels=config["num_channels"],
            image_field=self.image_field,
            label_field=self.label_field,
            processor=processor,
            cache=cache,
        )
        if found.bad:
            progress.say(
                f"{path}: {len(found.bad)} images cannot be read and are left out: {listed(list(found.bad))}"
            )
        return found if any_classes else as_the_head(found, subject, self.classes)

    def augmentation(self, subject: Subject) -> Augment:
        """Return the augmentation with the mean and standard deviation that the model expects."""
        said = _processor(subject)
        return replace(self.augment, mean=self.augment.mean or said.mean, std=self.augment.std or said.std)

    def question(self, batch: Batch, subject: Subject, *, training: bool) -> Question:
        augment = self.augmentation(subject)
        images, labels = augment.pixels(batch["pixels"]), batch["labels"]
        if not training:
            return Question({"pixel_values": augment.evaluate(images)}, labels)
        images, soft = augment.train(images, labels, subject.num_labels)
        return Question({"pixel_values": images}, soft)

    def targets(self, batch: Batch) -> int:
        return len(batch["labels"])

    def lengths(self, length: int, subject: Subject) -> dict[str, int]:
        return subject.lengths


def _processor(subject: Subject) -> ImageProcessor:
    """Return what the model's folder says of images."""
    model_type = str(subject.settings.get("model_type"))
    found = subject.preprocessor
    if found is None:
        return ImageProcessor(said={}, model_type=model_type)
    place = str(subject.folder / found.file) + (f" ({found.part})" if found.part else "")
    return ImageProcessor(said=found.said, model_type=model_type, place=place)


@lru_cache
def _warn_once(sentence: str) -> None:
    progress.warn(sentence)


task = ImageClassification
