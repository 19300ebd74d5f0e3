"""What preprocessor_config.json says of images: how they are resized, cut and normalised.

A key that the file lacks has the value that the processor's class in transformers gives it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from upcycle.data.preparation import BICUBIC, Covered, Preparation, Processed, Size
from upcycle.errors import UpcycleError, shown

_BILINEAR = 2
_FILTERS = range(6)  # the numbers of Pillow's filters
_WARPED = 384  # from this size on, a ConvNeXt sees the whole image
_HALF = (0.5, 0.5, 0.5)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_SQUARE = {"height": 224, "width": 224}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The defaults of a class of processors in transformers."""

    size: Mapping[str, int]
    crop_size: Mapping[str, int] | None = None  # None: no crop
    resample: int = BICUBIC
    mean: tuple[float, ...] = _HALF
    std: tuple[float, ...] = _HALF
    square: bool = False  # whether one number for `size` is that of both sides, and not of the shorter one
    crop_share: float | None = None  # a ConvNeXt's `crop_pct`


KINDS = {
    "ViT": Kind(size=_SQUARE, resample=_BILINEAR, square=True),
    "DeiT": Kind(size={"height": 256, "width": 256}, crop_size=_SQUARE, square=True),
    "Bit": Kind(size={"shortest_edge": 224}, crop_size=_SQUARE, mean=_CLIP[0], std=_CLIP[1]),
    "CLIP": Kind(size={"shortest_edge": 224}, crop_size=_SQUARE, mean=_CLIP[0], std=_CLIP[1]),
    "Siglip": Kind(size=_SQUARE),
    "ConvNext": Kind(size={"shortest_edge": 384}, crop_share=224 / 256),
    "DINOv3ViT": Kind(
        size=_SQUARE, resample=_BILINEAR, mean=_IMAGENET[0], std=_IMAGENET[1], square=True
    ),
}  # fmt: skip
OF_MODELS = {
    "vit": "ViT", "deit": "DeiT", "dinov2": "Bit", "dinov2_with_registers": "Bit", "clip": "CLIP",
    "clip_vision_model": "CLIP", "siglip": "Siglip", "siglip_vision_model": "Siglip",
    "convnext": "ConvNext", "convnextv2": "ConvNext", "dinov3_vit": "DINOv3ViT",
}  # fmt: skip
_OF_SIZE = ("do_resize", "size", "crop_pct", "do_center_crop", "crop_size", "resample", "do_pad")


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """The file of a model. One that says nothing stands for a model without the file."""

    said: Mapping[str, Any]
    model_type: str = ""
    place: str = "preprocessor_config.json"  # for messages

    @cached_property
    def kind(self) -> Kind | None:
        """The class that the file names, or that of the model's type; None for one that is not known here."""
        named = self.said.get("image_processor_type") or self.said.get("feature_extractor_type")
        if named is None:
            return KINDS.get(OF_MODELS.get(self.model_type, ""))
        name = str(named).removesuffix("Fast").removesuffix("ImageProcessor")
        return KINDS.get(name.removesuffix("FeatureExtractor"))

    # --- resizing and cutting

    def preparation(self, size: Size) -> Preparation:
        """Return how images get the size that the model takes: as the file says, as far as it fits."""
        if self._wanted is None:
            return Covered(size)
        if not self._wanted.fixed:
            return Covered(size, self._wanted.resample)
        return self._wanted if self._wanted.size == size else self._wanted.scaled(size)

    def warning(self, size: Size) -> str | None:
        """Return what of the file `preparation` does not follow, as a sentence; None if it follows all."""
        taken = f"{size[0]} x {size[1]}"
        if self._wanted is None or not self._wanted.fixed:
            if keys := [key for key in _OF_SIZE if key in self.said]:
                return (
                    f"{self.place}: {self._values(keys)} are not followed: images are resized so that they "
                    f"cover {taken} pixels, and cut at the centre"
                )
            return None
        others = [key for key in ("do_pad", *self._foreign) if self.said.get(key)]
        if self._wanted.size != size:
            others += [key for key in ("size", "crop_size") if key in self.said]
        if not others:
            return None
        return (
            f"{self.place}: {self._values(others)} cannot be followed: the model takes images of {taken} "
            f"pixels (config.json), and gets them, resized and cut in the proportions of the file"
        )

    @property
    def _foreign(self) -> tuple[str, ...]:
        """Keys that the class has no use for."""
        return ("do_center_crop",) if self.kind is not None and self.kind.crop_share else ()

    def _values(self, keys: list[str]) -> str:
        return ", ".join(f"{key} = {shown(self.said[key])}" for key in keys)

    @cached_property
    def _wanted(self) -> Processed | None:
        """What the file asks for; None if it says nothing, or what is not known here."""
        if not self.said or self.kind is None:
            return None
        size = self._size("size", self.kind.size, square=self.kind.square)
        if size is None:
            return None
        resample = self._of("resample", self.kind.resample)
        if resample not in _FILTERS or isinstance(resample, bool):
            raise self._odd("resample", "the number of a filter of Pillow, 0 to 5")
        resize = size if self._switch("do_resize") else None
        if self.kind.crop_share:
            return self._of_convnext(resize, resample)
        crop = self._size("crop_size", self.kind.crop_size or _SQUARE, square=True)
        cuts = self._switch("do_center_crop", self.kind.crop_size is not None)
        if cuts and not isinstance(crop, tuple):
            raise self._odd("crop_size", "a height and a width")
        return Processed(resize=resize, crop=crop if cuts else None, resample=resample)  # type: ignore[arg-type]

    def _of_convnext(self, resize: Size | int | None, resample: int) -> Processed:
        """Resize to `crop_pct` of the image and cut, or warp a large one."""
        assert self.kind is not None
        if resize is None:
            return Processed(resize=None, crop=None, resample=resample)
        if isinstance(resize, tuple):
            raise self._odd("size", "a shortest_edge")
        if resize >= _WARPED:
            return Processed(resize=(resize, resize), crop=None, resample=resample)
        share = self._number("crop_pct", self.kind.crop_share)
        return Processed(resize=int(resize / share), crop=(resize, resize), resample=resample)

    def _size(self, key: str, default: Mapping[str, int], *, square: bool) -> Size | int | None:
        """Return height and width, or the shorter side; None for a rule that is not known here."""
        found = self._of(key, default)
        if type(found) is int:
            found = {"height": found, "width": found} if square else {"shortest_edge": found}
        elif isinstance(found, list) and len(found) == 2:
            found = {"height": found[0], "width": found[1]}
        if not isinstance(found, Mapping):
            raise self._odd(key, "a number, or a table of height and width or shortest_edge")
        given = {name: value for name, value in found.items() if value is not None}
        if not all(type(side) is int and side > 0 for side in given.values()):
            raise self._odd(key, "of whole numbers of 1 or more")
        if given.keys() == {"shortest_edge"}:
            return int(given["shortest_edge"])
        return (given["height"], given["width"]) if given.keys() == {"height", "width"} else None

    # --- normalising

    @property
    def mean(self) -> tuple[float, ...]:
        """What is taken from each channel of pixels in 0..1; empty if nothing says it."""
        if not self._switch("do_normalize"):
            return (0.0,)
        return self._in_pixels("image_mean", () if self.kind is None else self.kind.mean)

    @property
    def std(self) -> tuple[float, ...]:
        """What each channel is divided by then; empty if nothing says it."""
        if not self._switch("do_normalize"):
            return (1 / self._scale,)
        found = self._in_pixels("image_std", () if self.kind is None else self.kind.std)
        if not all(value > 0 for value in found):
            raise self._odd("image_std", "of numbers above 0")
        return found

    @property
    def news(self) -> list[Any]:
        """Mean and standard deviation, unless earlier versions took the same: they read lists alone."""
        if not self.said:
            return []
        before = [self.said.get(key) for key in ("image_mean", "image_std")]
        lists = [each if isinstance(each, list) and each else list(_HALF) for each in before]
        now = [[*self.mean], [*self.std]]
        spread = [each * len(then) if len(each) == 1 else each for each, then in zip(now, lists, strict=True)]
        same = all(
            np.shape(a) == np.shape(b) and np.allclose(a, b) for a, b in zip(spread, lists, strict=True)
        )
        return [] if same else now

    @property
    def _scale(self) -> float:
        """The value of white before it is normalised: 1, unless the file says otherwise."""
        factor = self._number("rescale_factor", 1 / 255) if self._switch("do_rescale") else 1.0
        return 255 * factor

    def _in_pixels(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """Return numbers of the file for pixels in 0..1, whatever white is there."""
        found = self._of(key, list(default))
        values = [found] if type(found) in (int, float) else found
        if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
            raise self._odd(key, "a list of numbers")
        if not self.said:
            return ()
        return tuple(value / self._scale for value in values or [0.5])

    # --- keys

    def _of(self, key: str, default: Any) -> Any:
        found = self.said.get(key)
        return default if found is None else found

    def _switch(self, key: str, default: bool = True) -> bool:
        found = self._of(key, default)
        if not isinstance(found, bool):
            raise self._odd(key, "true or false")
        return found

    def _number(self, key: str, default: float | None) -> float:
        found = self._of(key, default)
        if type(found) not in (int, float) or not 0 < found < float("inf"):
            raise self._odd(key, "a number above 0")
        return float(found)

    def _odd(self, key: str, allowed: str) -> UpcycleError:
        return UpcycleError(f"{self.place}: {key} = {shown(self.said.get(key))}; it must be {allowed}")
