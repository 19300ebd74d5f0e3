"""Augments batches of images as tensors, and makes the soft targets that go with them.

Every draw comes from torch's global generator on the CPU, so that `torch.manual_seed` makes a batch
reproducible. A setting that is off draws nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from upcycle.errors import UpcycleError

if TYPE_CHECKING:
    from upcycle.data.augment import Augment


def pixels(images: Tensor) -> Tensor:
    """Convert uint8 [B, H, W, C] to float [B, C, H, W] in 0..1."""
    return images.permute(0, 3, 1, 2).contiguous().float().div_(255)


def normalized(settings: Augment, images: Tensor) -> Tensor:
    """Subtract each channel's mean from [B, C, H, W] and divide by its standard deviation."""
    return (images - _of(settings, images, "mean")) / _of(settings, images, "std")


def _of(settings: Augment, images: Tensor, name: str) -> Tensor:
    values: tuple[float, ...] = getattr(settings, name) or (0.5,)
    if len(set(values)) == 1:
        values = values[:1]
    if len(values) not in (1, images.shape[1]):
        raise UpcycleError(
            f"augment.{name} = {list(values)} is for {len(values)} channels and the images have "
            f"{images.shape[1]}; give one number a channel"
        )
    return torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)


def train(settings: Augment, images: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Augment and normalise images [B, C, H, W] in 0..1 with labels [B]; return them and targets [B, N].

    Each row of the targets sums to one: the share of every class in the image, smoothed.
    """
    if settings.resized_crop:
        crop = _resized_crop(tuple(images.shape[-2:]), settings.resized_crop, settings.interpolation)
        images = crop(images).clamp(0, 1)  # bicubic interpolation overshoots
    if settings.crop_padding:
        images = _cropped(images, settings.crop_padding)
    if settings.flip:
        flipped = (torch.rand(len(images)) < settings.flip).to(images.device)
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
    rand_augment = _RandAugment(
        settings.rand_augment_operations,
        settings.rand_augment_magnitude / 30,
        settings.rand_augment_std / 30,
        settings.rand_augment_probability,
        settings.interpolation,
    )
    for _ in range(settings.rand_augment_layers):
        images = rand_augment.layer(images)
    images = normalized(settings, images)
    if settings.erasing:
        images = _erased(settings, images)
    targets = F.one_hot(labels, num_labels).to(images.dtype)
    if settings.label_smoothing:
        targets = targets * (1 - settings.label_smoothing) + settings.label_smoothing / num_labels
    return _mixed(settings, images, targets)


def _erased(settings: Augment, images: Tensor) -> Tensor:
    """Erase a rectangle of each normalised image, with the probability of the settings."""
    erase = _erasing(settings.erasing, settings.erasing_area)
    if settings.erasing_fill == "mean":
        return erase(images)
    gone = erase(torch.ones_like(images[:, :1])) == 0
    return torch.where(gone, torch.randn(images.shape).to(images), images)


def _mixed(settings: Augment, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mix every image with another of the batch, by mixup or cutmix, with one share for the whole batch."""
    if not (settings.mixup or settings.cutmix):
        return images, targets
    cut = bool(settings.cutmix) and (not settings.mixup or bool(torch.rand(()) < 0.5))
    alpha = settings.cutmix if cut else settings.mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other = torch.randperm(len(images)).to(images.device)
    if cut:
        images, share = _cut(images, other, share)
    else:
        images = torch.lerp(images[other], images, share)
    return images, torch.lerp(targets[other], targets, share)


def _cropped(images: Tensor, padding: int) -> Tensor:
    """Pad each image with zeros and crop it to its original size at a random place."""
    count, _, height, width = images.shape
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * padding + 1, (2, count)).to(images.device)
    return windows[torch.arange(count, device=images.device), :, top, left]


def _cut(images: Tensor, other: Tensor, share: float) -> tuple[Tensor, float]:
    """Paste a rectangle of the other images in; return the images and the share left of the originals.

    Before it is clipped at the border, the rectangle has 1 - share of the area.
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


# --- operations from kornia


def _kornia(part: str) -> Any:
    """Import a part of kornia on demand; the import takes a second."""
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
    """Apply SolarizeAdd: add up to 110 of 255 to pixels of less than half the brightness."""
    return torch.where(images < 128 / 255, (images + strength * 110 / 255).clamp(max=1), images)


# The arguments are kornia's module, images [B, C, H, W], a factor [B] of 1 +- 0.9 strength, and the strength
# [B] in 0..1.
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
_TRANSLATIONS = {"paper": 150 / 331, "increasing": 0.45}  # as a share of the side


@dataclasses.dataclass(frozen=True)
class _RandAugment:
    """RandAugment with operations drawn for each image.

    `paper` has the paper's fourteen operations, one of which is the identity. `increasing` has timm's fifteen
    with increasing severity (rand-m9-mstd0.5-inc1), as in mmpretrain, without the identity. The operations
    are kornia's, which agree with Pillow's; kornia's own RandAugment draws one operation for the whole batch.
    A larger magnitude always changes more, in the ranges of torchvision and timm. `strength` and `deviation`
    are shares of the largest magnitude.
    """

    operations: str
    strength: float
    deviation: float = 0.0
    probability: float = 1.0
    interpolation: str = "bilinear"

    def layer(self, images: Tensor) -> Tensor:
        """Apply one operation to each image."""
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
    """Rotate, shear and translate images by `levels` [B, 5] of the largest change, with zero padding."""
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
