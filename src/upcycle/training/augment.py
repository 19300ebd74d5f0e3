"""Augmentation of batches of images on tensors, and the soft targets that go with it.

Every draw comes from torch's global generator on the CPU: `torch.manual_seed` makes a batch repeatable, and
what is off draws nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from upcycle.errors import UpcycleError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """The `[augment]` table. What is 0 is off."""

    flip: float = 0.5  # probability of a horizontal flip
    crop_padding: int = 0  # pixels of zeros on every side, out of which the old size is cropped
    resized_crop: float = 0.0  # smallest share of the area that is cropped and resized
    rand_augment_layers: int = 0  # operations in a row, drawn for each image
    rand_augment_magnitude: float = 9.0  # 0 to 30
    mixup: float = 0.0  # alpha of the beta distribution
    cutmix: float = 0.0  # alpha; where mixup is on as well, each batch takes one of the two
    erasing: float = 0.0  # probability that a rectangle becomes the mean colour
    label_smoothing: float = 0.0
    mean: tuple[float, ...] = ()  # of a channel; none: those of preprocessor_config.json, or 0.5
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("flip", "erasing", "resized_crop"):
            if not 0 <= getattr(self, name) <= 1:
                raise UpcycleError(f"augment.{name} = {getattr(self, name)}; it must be in [0, 1]")
        for name in ("mixup", "cutmix"):
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
        if not 0 <= self.label_smoothing < 1:
            raise UpcycleError(f"augment.label_smoothing = {self.label_smoothing}; it must be in [0, 1)")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not all(map(math.isfinite, values)):
                raise UpcycleError(f"augment.{name} = {list(values)}; it must be a number a channel")
        if self.std and min(self.std) <= 0:
            raise UpcycleError(f"augment.std = {list(self.std)}; it must be above 0")

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
            images = _resized_crop(tuple(images.shape[-2:]), self.resized_crop)(images)
        if self.crop_padding:
            images = _cropped(images, self.crop_padding)
        if self.flip:
            flipped = (torch.rand(len(images)) < self.flip).to(images.device)
            images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
        for _ in range(self.rand_augment_layers):
            images = _rand_augment_layer(images, self.rand_augment_magnitude / 30)
        images = self.normalized(images)
        if self.erasing:
            images = _erasing(self.erasing)(images)
        targets = F.one_hot(labels, num_labels).to(images.dtype)
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / num_labels
        return self._mixed(images, targets)

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
def _resized_crop(size: tuple[int, int], smallest: float) -> Callable[[Tensor], Tensor]:
    made: Callable[[Tensor], Tensor] = _kornia("augmentation").RandomResizedCrop(
        size, scale=(smallest, 1.0), ratio=(3 / 4, 4 / 3), align_corners=False
    )
    return made


@lru_cache(maxsize=8)
def _erasing(probability: float) -> Callable[[Tensor], Tensor]:
    made: Callable[[Tensor], Tensor] = _kornia("augmentation").RandomErasing(p=probability)
    return made


_COLOURS: tuple[Callable[[Any, Tensor, Tensor, float], Tensor], ...] = (
    lambda k, x, change, strength: k.normalize_min_max(x),
    lambda k, x, change, strength: k.equalize(x),
    lambda k, x, change, strength: k.posterize(x, 8 - round(4 * strength)),
    lambda k, x, change, strength: k.solarize(x, 1 - strength),
    lambda k, x, change, strength: k.adjust_brightness_accumulative(x, change),
    lambda k, x, change, strength: k.adjust_contrast_with_mean_subtraction(x, change),
    lambda k, x, change, strength: k.sharpness(x, change),
    lambda k, x, change, strength: (
        k.adjust_saturation_with_gray_subtraction(x, change) if x.shape[1] == 3 else x
    ),
)
_MOVES = 5  # rotate, shear in x and y, translate in x and y
_ROTATION = math.radians(30)
_SHEAR = 0.3
_TRANSLATION = 150 / 331  # of the side


def _rand_augment_layer(images: Tensor, strength: float) -> Tensor:
    """One operation of RandAugment on each image, drawn for each out of the paper's fourteen, one being none.

    The operations are kornia's, which agree with Pillow's; its RandAugment draws one for the whole batch. The
    ranges are torchvision's, in which a larger magnitude always changes more.
    """
    enhance = _kornia("enhance")
    chosen = torch.randint(len(_COLOURS) + _MOVES + 1, (len(images),))
    signs = torch.where(torch.rand(len(images)) < 0.5, -1.0, 1.0)
    out = images.clone()
    for number, operation in enumerate(_COLOURS):
        rows = (chosen == number).nonzero().flatten()
        if len(rows):
            change = (1 + 0.9 * strength * signs[rows]).to(images.device)
            rows = rows.to(images.device)
            out[rows] = operation(enhance, images[rows], change, strength)
    rows = ((chosen >= len(_COLOURS)) & (chosen < len(_COLOURS) + _MOVES)).nonzero().flatten()
    if len(rows):
        levels = F.one_hot(chosen[rows] - len(_COLOURS), _MOVES) * (strength * signs[rows, None])
        rows = rows.to(images.device)
        out[rows] = _moved(images[rows], levels)
    return out


def _moved(images: Tensor, levels: Tensor) -> Tensor:
    """Images rotated, sheared and translated by `levels` [B, 5] of the largest change, zeros around them."""
    height, width = images.shape[-2:]
    angle = levels[:, 0] * _ROTATION
    sine, cosine = angle.sin(), angle.cos()
    matrix = torch.stack(
        [
            torch.stack(
                [cosine, (sine + levels[:, 1] * _SHEAR) * height / width, 2 * _TRANSLATION * levels[:, 3]], -1
            ),
            torch.stack(
                [(levels[:, 2] * _SHEAR - sine) * width / height, cosine, 2 * _TRANSLATION * levels[:, 4]], -1
            ),
        ],
        1,
    ).to(images)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
