"""Augmentation of batches of images on tensors, and the soft targets that go with it.

Every draw comes from torch's global generator on the CPU: `torch.manual_seed` makes a batch repeatable, and
what is off draws nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from upcycle.errors import UpcycleError
from upcycle.settings import Above, AtLeast, Finite, Settings, Within


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
        return images.permute(0, 3, 1, 2).contiguous().float().div_(255)

    def normalized(self, images: Tensor) -> Tensor:
        """[B, C, H, W] less the mean, divided by the standard deviation of each channel."""
        return (images - self._of(images, "mean")) / self._of(images, "std")

    def _of(self, images: Tensor, name: str) -> Tensor:
        values: tuple[float, ...] = getattr(self, name) or (0.5,)
        if len(set(values)) == 1:
            values = values[:1]
        if len(values) not in (1, images.shape[1]):
            raise UpcycleError(
                f"augment.{name} = {list(values)} is for {len(values)} channels and the images have "
                f"{images.shape[1]}; give one number a channel"
            )
        return torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)

    def evaluate(self, images: Tensor) -> Tensor:
        """Images in 0..1 as the model takes them, nothing changed at random."""
        return self.normalized(images)

    def train(self, images: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] in 0..1 and labels [B] as augmented, normalised images and targets [B, N].

        A row of the targets sums to one: the shares that the classes have in the image, smoothed.
        """
        if self.resized_crop:
            crop = _resized_crop(tuple(images.shape[-2:]), self.resized_crop, self.interpolation)
            images = crop(images).clamp(0, 1)  # bicubic goes beyond
        if self.crop_padding:
            images = _cropped(images, self.crop_padding)
        if self.flip:
            flipped = (torch.rand(len(images)) < self.flip).to(images.device)
            images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
        rand_augment = _RandAugment(
            self.rand_augment_operations,
            self.rand_augment_magnitude / 30,
            self.rand_augment_std / 30,
            self.rand_augment_probability,
            self.interpolation,
        )
        for _ in range(self.rand_augment_layers):
            images = rand_augment.layer(images)
        images = self.normalized(images)
        if self.erasing:
            images = self._erased(images)
        targets = F.one_hot(labels, num_labels).to(images.dtype)
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / num_labels
        return self._mixed(images, targets)

    def _erased(self, images: Tensor) -> Tensor:
        """Normalised images with a rectangle of each erased, or not."""
        erase = _erasing(self.erasing, self.erasing_area)
        if self.erasing_fill == "mean":
            return erase(images)
        gone = erase(torch.ones_like(images[:, :1])) == 0
        return torch.where(gone, torch.randn(images.shape).to(images), images)

    def _mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Every image with another of the batch, by mixup or cutmix, one share for all."""
        if not (self.mixup or self.cutmix):
            return images, targets
        cut = bool(self.cutmix) and (not self.mixup or bool(torch.rand(()) < 0.5))
        alpha = self.cutmix if cut else self.mixup
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        other = torch.randperm(len(images)).to(images.device)
        if cut:
            images, share = _cut(images, other, share)
        else:
            images = torch.lerp(images[other], images, share)
        return images, torch.lerp(targets[other], targets, share)


def _cropped(images: Tensor, padding: int) -> Tensor:
    """A crop of each image's own size, out of the image with zeros around it."""
    count, _, height, width = images.shape
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * padding + 1, (2, count)).to(images.device)
    return windows[torch.arange(count, device=images.device), :, top, left]


def _cut(images: Tensor, other: Tensor, share: float) -> tuple[Tensor, float]:
    """A rectangle of the other images pasted in, and the share that is left of the first ones.

    The rectangle has 1 - share of the area before it is clipped at the border.
    """
    size = images.shape[-2:]
    sides = [round(n * math.sqrt(1 - share)) for n in size]
    starts = [int(torch.randint(n, ())) - side // 2 for n, side in zip(size, sides, strict=True)]
    rows, columns = (
        slice(max(start, 0), min(start + side, n)) for n, side, start in zip(size, sides, starts, strict=True)
    )
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[other, :, rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - area / (size[0] * size[1])


# --- what kornia does


def _kornia(part: str) -> Any:
    """A part of kornia, which takes a second to import."""
    import importlib

    try:
        return importlib.import_module(f"kornia.{part}")
    except ModuleNotFoundError:
        raise UpcycleError(
            "augment.rand_augment_layers, resized_crop and erasing need kornia: pip install 'upcycle[vision]'"
        ) from None


@lru_cache(maxsize=8)
def _resized_crop(size: tuple[int, int], smallest: float, interpolation: str) -> Callable[[Tensor], Tensor]:
    made: Callable[[Tensor], Tensor] = _kornia("augmentation").RandomResizedCrop(
        size, scale=(smallest, 1.0), ratio=(3 / 4, 4 / 3), resample=interpolation, align_corners=False
    )
    return made


@lru_cache(maxsize=8)
def _erasing(probability: float, area: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    made: Callable[[Tensor], Tensor] = _kornia("augmentation").RandomErasing(
        p=probability, scale=area, ratio=(0.3, 3.3)
    )
    return made


def _brighter_shadows(images: Tensor, strength: Tensor) -> Tensor:
    """SolarizeAdd: up to 110 of 255 more, where there is less than half the light."""
    return torch.where(images < 128 / 255, (images + strength * 110 / 255).clamp(max=1), images)


# Kornia's module, images [B, C, H, W], a factor [B] of 1 +- 0.9 strength, and the strength [B] in 0..1.
_COLOURS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "autocontrast": lambda k, x, change, strength: k.normalize_min_max(x),
    "equalize": lambda k, x, change, strength: k.equalize(x),
    "posterize": lambda k, x, change, strength: k.posterize(x, 8 - (4 * strength).round().int()),
    "solarize": lambda k, x, change, strength: k.solarize(x, 1 - strength),
    "brightness": lambda k, x, change, strength: k.adjust_brightness_accumulative(x, change),
    "contrast": lambda k, x, change, strength: k.adjust_contrast_with_mean_subtraction(x, change),
    "sharpness": lambda k, x, change, strength: k.sharpness(x, change),
    "colour": lambda k, x, change, strength: (
        k.adjust_saturation_with_gray_subtraction(x, change) if x.shape[1] == 3 else x
    ),
    "posterize to nothing": lambda k, x, change, strength: k.posterize(x, 4 - (4 * strength).floor().int()),
    "invert": lambda k, x, change, strength: 1 - x,
    "solarize add": lambda k, x, change, strength: _brighter_shadows(x, strength.view(-1, 1, 1, 1)),
}
_OPERATIONS = {
    "paper": tuple(_COLOURS)[:8],
    "increasing": tuple(name for name in _COLOURS if name != "posterize"),
}
_MOVES = 5  # rotate, shear in x and y, translate in x and y
_ROTATION = math.radians(30)
_SHEAR = 0.3
_TRANSLATIONS = {"paper": 150 / 331, "increasing": 0.45}  # of the side


@dataclasses.dataclass(frozen=True)
class _RandAugment:
    """Operations of RandAugment, drawn for each image.

    `paper`: the paper's fourteen, one being none. `increasing`: timm's fifteen with increasing severity
    (rand-m9-mstd0.5-inc1), as in mmpretrain; none of them is none. The operations are kornia's, which agree
    with Pillow's; its RandAugment draws one for the whole batch. A larger magnitude always changes more, in
    ranges that are torchvision's and timm's. Strengths and their deviation are shares of the largest.
    """

    operations: str
    strength: float
    deviation: float = 0.0
    probability: float = 1.0
    interpolation: str = "bilinear"

    def layer(self, images: Tensor) -> Tensor:
        """One operation on each image."""
        enhance, colours = _kornia("enhance"), _OPERATIONS[self.operations]
        nothing = self.operations == "paper"
        count = len(images)
        chosen = torch.randint(len(colours) + _MOVES + nothing, (count,))
        signs = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
        strength = torch.full((count,), self.strength)
        if self.deviation:
            strength = (strength + self.deviation * torch.randn(count)).clamp(0, 1)
        if self.probability < 1:
            chosen = chosen.masked_fill(torch.rand(count) >= self.probability, -1)
        out = images.clone()
        for number, name in enumerate(colours):
            rows = (chosen == number).nonzero().flatten()
            if len(rows):
                change = (1 + 0.9 * strength[rows] * signs[rows]).to(images.device)
                own = strength[rows].to(images.device)
                rows = rows.to(images.device)
                out[rows] = _COLOURS[name](enhance, images[rows], change, own)
        rows = ((chosen >= len(colours)) & (chosen < len(colours) + _MOVES)).nonzero().flatten()
        if len(rows):
            levels = F.one_hot(chosen[rows] - len(colours), _MOVES) * (strength * signs)[rows, None]
            rows = rows.to(images.device)
            out[rows] = _moved(images[rows], levels, _TRANSLATIONS[self.operations], self.interpolation)
        return out


def _moved(images: Tensor, levels: Tensor, translation: float, interpolation: str = "bilinear") -> Tensor:
    """Images rotated, sheared and translated by `levels` [B, 5] of the largest change, zeros around them."""
    height, width = images.shape[-2:]
    angle = levels[:, 0] * _ROTATION
    sine, cosine = angle.sin(), angle.cos()
    x, y = 2 * translation * levels[:, 3], 2 * translation * levels[:, 4]
    matrix = torch.stack(
        [
            torch.stack([cosine, (sine + levels[:, 1] * _SHEAR) * height / width, x], -1),
            torch.stack([(levels[:, 2] * _SHEAR - sine) * width / height, cosine, y], -1),
        ],
        1,
    ).to(images)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode=interpolation, align_corners=False).clamp(0, 1)
