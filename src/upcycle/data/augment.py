"""The settings of image augmentation. `augmentation.py` applies them with torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from upcycle.errors import UpcycleError
from upcycle.settings import Above, AtLeast, Finite, Settings, Within

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment(Settings):
    """The `[task.augment]` table. A setting of 0 is off."""

    section: ClassVar[str] = "task.augment"

    # probability of a horizontal flip; set it to 0 for digits and letters
    flip: Annotated[float, Within("[0, 1]")] = 0.5
    # pixels of zeros added on every side before a crop of the original size
    crop_padding: Annotated[int, AtLeast(0)] = 0
    # smallest share of the area to crop and resize
    resized_crop: Annotated[float, Within("[0, 1]")] = 0.0
    # interpolation in resized crops and RandAugment
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    rand_augment_layers: Annotated[int, AtLeast(0)] = 0  # number of operations in a row, drawn for each image
    # magnitude of an operation, out of 30; timm and mmpretrain count to 10: their m9 is 27
    rand_augment_magnitude: Annotated[float, Within("[0, 30]")] = 9.0
    # standard deviation of the magnitude, drawn for each image and operation; their mstd0.5 is 1.5
    rand_augment_std: Annotated[float, AtLeast(0)] = 0.0
    # probability that an operation is applied at all; theirs is 0.5
    rand_augment_probability: Annotated[float, Within("[0, 1]")] = 1.0
    rand_augment_operations: Literal["paper", "increasing"] = "paper"  # see `_RandAugment`
    mixup: Annotated[float, AtLeast(0)] = 0.0  # alpha of the beta distribution
    # alpha of the beta distribution; if mixup is on as well, each batch takes one of the two
    cutmix: Annotated[float, AtLeast(0)] = 0.0
    erasing: Annotated[float, Within("[0, 1]")] = 0.0  # probability that a rectangle is erased
    # smallest and largest share of the area for the rectangle
    erasing_area: tuple[Annotated[float, Within("(0, 1]")], ...] = (0.02, 0.33)
    # fill the rectangle with the mean colour, or with N(0, 1) for each pixel (`rand` elsewhere)
    erasing_fill: Literal["mean", "noise"] = "mean"
    # share of the target that is spread evenly over all classes
    label_smoothing: Annotated[float, Within("[0, 1)")] = 0.0
    # mean of each channel; none: that of preprocessor_config.json, or 0.5
    mean: tuple[Annotated[float, Finite()], ...] = ()
    std: tuple[Annotated[float, Above(0)], ...] = ()  # standard deviation of each channel, likewise

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.erasing_area) != 2 or self.erasing_area[0] > self.erasing_area[1]:
            raise UpcycleError(
                f"task.augment.erasing_area = {list(self.erasing_area)}; it must be the smallest and the "
                f"largest share of the image"
            )

    def pixels(self, images: Tensor) -> Tensor:
        """Convert uint8 [B, H, W, C] to float [B, C, H, W] in 0..1."""
        from upcycle.data import augmentation

        return augmentation.pixels(images)

    def normalized(self, images: Tensor) -> Tensor:
        """Subtract each channel's mean from [B, C, H, W] and divide by its standard deviation."""
        from upcycle.data import augmentation

        return augmentation.normalized(self, images)

    def evaluate(self, images: Tensor) -> Tensor:
        """Return images in 0..1 as the model expects them, without random changes."""
        return self.normalized(images)

    def train(self, images: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
        """Augment and normalise images [B, C, H, W] in 0..1 with labels [B]; return them and targets [B, N].

        Each row of the targets sums to one: the share of every class in the image, smoothed.
        """
        from upcycle.data import augmentation

        return augmentation.train(self, images, labels, num_labels)
