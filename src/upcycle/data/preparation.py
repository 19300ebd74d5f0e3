"""How an image becomes pixels of the size that a model takes, before they are normalised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

Size = tuple[int, int]  # height, width
BICUBIC = 3  # the filters have Pillow's numbers


class Preparation(Protocol):
    """A way to make pixels of one size. It is known by `key`, which is a part of that of a cache."""

    @property
    def size(self) -> Size: ...

    @property
    def key(self) -> list[Any]: ...

    def pixels(self, image: Any) -> np.ndarray:
        """Return the pixels of a Pillow image of 1 or 3 channels, uint8 [H, W] or [H, W, 3]."""


@dataclass(frozen=True)
class Covered:
    """Resize an image so that it covers `size`, and crop the centre."""

    size: Size
    resample: int = BICUBIC

    @property
    def key(self) -> list[Any]:
        return [] if self.resample == BICUBIC else ["covered", self.resample]

    def pixels(self, image: Any) -> np.ndarray:
        height, width = self.size
        if image.width * height <= image.height * width:
            resized = width, max(height, image.height * width // image.width)
        else:
            resized = max(width, image.width * height // image.height), height
        left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
        return _resized(image, resized, self.resample)[top : top + height, left : left + width]


@dataclass(frozen=True, kw_only=True)
class Processed:
    """Resize an image and crop its centre as the image processors of transformers do."""

    resize: Size | int | None  # height and width whatever the shape, or the shorter side; None: not at all
    crop: Size | None  # None: no crop
    resample: int

    @property
    def key(self) -> list[Any]:
        return ["processed", self.resize, self.crop, self.resample]

    @property
    def fixed(self) -> bool:
        """True if all images come out in one size."""
        return self.crop is not None or isinstance(self.resize, tuple)

    @property
    def size(self) -> Size:
        assert self.fixed
        return self.crop or self.resize  # type: ignore[return-value]

    def scaled(self, size: Size) -> Processed:
        """Return the same in another size: resized in proportion to the crop."""
        factors = [new / old for new, old in zip(size, self.size, strict=True)]
        resize: Size | int | None = self.resize
        if isinstance(resize, int):
            resize = round(resize * max(factors))
        elif resize is not None:
            resize = round(resize[0] * factors[0]), round(resize[1] * factors[1])
        return replace(self, resize=resize, crop=None if self.crop is None else size)

    def pixels(self, image: Any) -> np.ndarray:
        pixels = _resized(image, self._resized(image.width, image.height), self.resample)
        return pixels if self.crop is None else _cropped(pixels, self.crop)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after resizing."""
        match self.resize:
            case None:
                return width, height
            case int() as side:
                longer = int(side * max(width, height) / min(width, height))
                return (side, longer) if width <= height else (longer, side)
            case high, wide:
                return wide, high


def _resized(image: Any, size: tuple[int, int], resample: int) -> np.ndarray:
    return np.asarray(image if size == image.size else image.resize(size, resample))


def _cropped(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Cut the centre out, with zeros around an image that is smaller."""
    for axis, wanted in enumerate(size):
        excess = pixels.shape[axis] - wanted
        if excess >= 0:
            pixels = pixels.take(np.arange(excess // 2, excess // 2 + wanted), axis)
        else:
            around = [(0, 0)] * pixels.ndim
            around[axis] = (-(excess // 2), -excess + excess // 2)
            pixels = np.pad(pixels, around)
    return pixels
