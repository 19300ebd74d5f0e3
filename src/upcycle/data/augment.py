"""How images are augmented: the settings. `augmentation.py` does it, with torch."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

from upcycle.errors import UpcycleError

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """The `[augment]` table. What is 0 is off."""

    flip: float = 0.5  # probability of a horizontal flip; set it to 0 for digits and letters
    crop_padding: int = 0  # pixels of zeros on every side, out of which the old size is cropped
    resized_crop: float = 0.0  # smallest share of the area that is cropped and resized
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # of resized crops and of RandAugment's moves
    rand_augment_layers: int = 0  # operations in a row, drawn for each image
    rand_augment_magnitude: float = 9.0  # 0 to 30; timm and mmpretrain count to 10: their m9 is 27
    rand_augment_std: float = (
        0.0  # of the magnitude, drawn for each image and operation; their mstd0.5 is 1.5
    )
    rand_augment_probability: float = 1.0  # of an operation to be done at all; theirs is 0.5
    rand_augment_operations: Literal["paper", "increasing"] = "paper"  # see `_RandAugment`
    mixup: float = 0.0  # alpha of the beta distribution
    cutmix: float = 0.0  # alpha; where mixup is on as well, each batch takes one of the two
    erasing: float = 0.0  # probability that a rectangle is erased
    erasing_area: tuple[float, ...] = (0.02, 0.33)  # of the rectangle, smallest and largest share
    erasing_fill: Literal["mean", "noise"] = (
        "mean"  # its colour, or N(0, 1) for each pixel (`rand` of others)
    )
    label_smoothing: float = 0.0  # share of the target that all classes get alike
    mean: tuple[float, ...] = ()  # of a channel; none: those of preprocessor_config.json, or 0.5
    std: tuple[float, ...] = ()  # of a channel, likewise

    def __post_init__(self) -> None:
        for name in ("flip", "erasing", "resized_crop", "rand_augment_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UpcycleError(f"augment.{name} = {getattr(self, name)}; it must be in [0, 1]")
        for name in ("mixup", "cutmix", "rand_augment_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UpcycleError(
                    f"augment.{name} = {getattr(self, name)}; it must be a number of 0 or more"
                )
        for name in ("crop_padding", "rand_augment_layers"):
            if getattr(self, name) < 0:
                raise UpcycleError(f"augment.{name} = {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.rand_augment_magnitude <= 30:
            raise UpcycleError(
                f"augment.rand_augment_magnitude = {self.rand_augment_magnitude}; it must be in [0, 30]"
            )
        if len(self.erasing_area) != 2 or not 0 < self.erasing_area[0] <= self.erasing_area[1] <= 1:
            raise UpcycleError(
                f"augment.erasing_area = {list(self.erasing_area)}; it must be the smallest and the largest "
                f"share of the image, in (0, 1]"
            )
        if not 0 <= self.label_smoothing < 1:
            raise UpcycleError(f"augment.label_smoothing = {self.label_smoothing}; it must be in [0, 1)")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not all(map(math.isfinite, values)):
                raise UpcycleError(f"augment.{name} = {list(values)}; it must be a number a channel")
        if self.std and min(self.std) <= 0:
            raise UpcycleError(f"augment.std = {list(self.std)}; it must be above 0")

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] as float [B, C, H, W] in 0..1."""
        from upcycle.data import augmentation

        return augmentation.pixels(images)

    def normalized(self, images: Tensor) -> Tensor:
        """[B, C, H, W] less the mean, divided by the standard deviation of each channel."""
        from upcycle.data import augmentation

        return augmentation.normalized(self, images)

    def evaluate(self, images: Tensor) -> Tensor:
        """Images in 0..1 as the model takes them, nothing changed at random."""
        return self.normalized(images)

    def train(self, images: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] in 0..1 and labels [B] as augmented, normalised images and targets [B, N].

        A row of the targets sums to one: the shares that the classes have in the image, smoothed.
        """
        from upcycle.data import augmentation

        return augmentation.train(self, images, labels, num_labels)
