"""How images are augmented: the settings. `augmentation.py` does it, with torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from upcycle.errors import UpcycleError
from upcycle.settings import Above, AtLeast, Finite, Settings, Within

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment(Settings):
    """The `[task.augment]` table. What is 0 is off."""

    section: ClassVar[str] = "task.augment"

    # probability of a horizontal flip; set it to 0 for digits and letters
    flip: Annotated[float, Within("[0, 1]")] = 0.5
    # pixels of zeros on every side, out of which the old size is cropped
    crop_padding: Annotated[int, AtLeast(0)] = 0
    # smallest share of the area that is cropped and resized
    resized_crop: Annotated[float, Within("[0, 1]")] = 0.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # of resized crops and of RandAugment's moves
    rand_augment_layers: Annotated[int, AtLeast(0)] = 0  # operations in a row, drawn for each image
    # timm and mmpretrain count to 10: their m9 is 27
    rand_augment_magnitude: Annotated[float, Within("[0, 30]")] = 9.0
    # of the magnitude, drawn for each image and operation; their mstd0.5 is 1.5
    rand_augment_std: Annotated[float, AtLeast(0)] = 0.0
    # of an operation to be done at all; theirs is 0.5
    rand_augment_probability: Annotated[float, Within("[0, 1]")] = 1.0
    rand_augment_operations: Literal["paper", "increasing"] = "paper"  # see `_RandAugment`
    mixup: Annotated[float, AtLeast(0)] = 0.0  # alpha of the beta distribution
    # alpha; where mixup is on as well, each batch takes one of the two
    cutmix: Annotated[float, AtLeast(0)] = 0.0
    erasing: Annotated[float, Within("[0, 1]")] = 0.0  # probability that a rectangle is erased
    # of the rectangle, smallest and largest share
    erasing_area: tuple[Annotated[float, Within("(0, 1]")], ...] = (0.02, 0.33)
    # its colour, or N(0, 1) for each pixel (`rand` of others)
    erasing_fill: Literal["mean", "noise"] = "mean"
    # share of the target that all classes get alike
    label_smoothing: Annotated[float, Within("[0, 1)")] = 0.0
    # of a channel; none: those of preprocessor_config.json, or 0.5
    mean: tuple[Annotated[float, Finite()], ...] = ()
    std: tuple[Annotated[float, Above(0)], ...] = ()  # of a channel, likewise

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.erasing_area) != 2 or self.erasing_area[0] > self.erasing_area[1]:
            raise UpcycleError(
                f"task.augment.erasing_area = {list(self.erasing_area)}; it must be the smallest and the "
                f"largest share of the image"
            )

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
