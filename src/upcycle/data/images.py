"""Labelled images that are decoded once.

`KEY.pixels` holds the decoded images, memory-mapped. `KEY.json`, written last, describes them. It has a
hash of the files that they were made from, which are known by their stamps and, if those differ, by content.
If the decoded images would take more than `CACHE_LIMIT`, they are decoded on every read. The first pass then
only finds those that cannot be decoded, and leaves `KEY.images`: the encoded images of a parquet file,
concatenated.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from upcycle.checkpoints.checkpoint import file_hash
from upcycle.data.documents import Source, say_left_out
from upcycle.data.examples import refuse_other_classes
from upcycle.data.image_files import ImageFiles, ImageFolder, ImageParquet, images_at, pillow, read_bytes
from upcycle.data.image_processor import ImageProcessor
from upcycle.data.preparation import Preparation, Size
from upcycle.data.stamps import stamp_of_all
from upcycle.errors import UpcycleError
from upcycle.system import progress, whole_file
from upcycle.system.progress import Work

FORMAT = 1
CACHE_LIMIT = 8 << 30  # maximum bytes of decoded images to cache
_CHUNK = 64  # images decoded at a time
_THREADS = 8
_NONE = ImageProcessor(said={})

Read = Callable[[np.ndarray], np.ndarray]  # int64 [B] -> uint8 [B, H, W, C]


@dataclass(frozen=True, kw_only=True)
class Form:
    """What all images of a set are decoded to."""

    preparation: Preparation
    channels: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return (*self.preparation.size, self.channels)

    @property
    def key(self) -> list[Any]:
        """What the pixels depend on besides the files and `shape`."""
        return self.preparation.key


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Images of one size with their labels."""

    name: str
    size: Size
    channels: int
    labels: np.ndarray  # int64 [N]
    class_names: tuple[str, ...]  # empty if the data has none
    num_labels: int
    bad: tuple[str, ...]  # images left out because they cannot be decoded: FILE, or FILE, row N
    _read: Read = field(repr=False)
    digest: str  # hash of the decoded images, or of the encoded ones if these are decoded on every read

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        size: Size,
        channels: int,
        image_field: str = "image",
        label_field: str = "label",
        processor: ImageProcessor = _NONE,
        cache: Path,
    ) -> ImageSet:
        """Open the images at `path` in the size [H, W], resized and cut as `processor` says.

        If it says nothing, they are resized so that they cover `size`, and cut at the centre.
        One process must call this first; the others then find its work in the folder `cache`. Raises
        `UpcycleError` for data that cannot be used.
        """
        if channels not in (1, 3) or min(size) < 1:
            raise UpcycleError(
                f"images of {size[0]} x {size[1]} pixels and {channels} channels; a side must be 1 or more, "
                f"and there are 1 channel (grey) or 3 (red, green, blue)"
            )
        pillow()
        source = images_at(Path(path), image_field, label_field)
        say_left_out(Source(path=str(path)), source.endings)
        form = Form(preparation=processor.preparation(size), channels=channels)
        names, labels = source.class_names, source.labels
        known, read = _prepared(source, form, cache)
        return cls(
            name=str(path),
            size=size,
            channels=channels,
            labels=np.delete(labels, known["left_out"]),
            class_names=names,
            num_labels=len(names) or int(labels.max()) + 1,
            bad=tuple(source.where(i) for i in known["left_out"]),
            _read=read,
            digest=_marked(known["sha256"], processor.news),
        )

    kind: ClassVar[str] = "images"

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the images numbered `indices`: pixels uint8 [B, H, W, C], labels int64 [B]."""
        return {"pixels": self.read(indices), "labels": self.labels[indices]}

    def refuse(self, held_out: ImageSet) -> None:
        """Raise `UpcycleError` if `held_out` does not fit this training set."""
        a, b = ((*s.size, s.channels) for s in (self, held_out))
        if a != b:
            raise UpcycleError(
                f"{self.name} is of images {a} and {held_out.name} of images {b}; open both with one size"
            )
        refuse_other_classes(self, held_out)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return the pixels of the images numbered `indices`: uint8 [B, H, W, C]."""
        return self._read(np.asarray(indices, np.int64))


# --- from bytes to pixels


def decoded(data: bytes, form: Form) -> np.ndarray | None:
    """Decode an image to uint8 [H, W, C]; None if it cannot be decoded."""
    image_module = pillow()
    try:
        with image_module.open(io.BytesIO(data)) as opened:
            image = opened
            if image.mode.startswith("I;16"):  # Pillow's own conversion clips 16 bits at 255
                image = image_module.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("L" if form.channels == 1 else "RGB")
    except MemoryError:
        raise
    except Exception:  # Pillow's decoders can raise anything for a broken file
        return None
    return form.preparation.pixels(image).reshape(form.shape)


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "images")


def _all_decoded(encoded: Iterable[bytes], form: Form) -> Iterator[tuple[bytes, np.ndarray | None]]:
    """Decode every image of `encoded` in several threads; yield its bytes and pixels in order."""
    stream = iter(encoded)
    while chunk := list(islice(stream, _CHUNK)):
        yield from zip(chunk, _pool().map(partial(decoded, form=form), chunk), strict=True)


# --- the cache


def _prepared(source: ImageFiles, form: Form, cache: Path) -> tuple[dict[str, Any], Read]:
    """Return the description of the images, from the cache or made now, and the function that reads them."""
    whole = len(source.labels) * int(np.prod(form.shape)) <= CACHE_LIMIT
    path = cache / f"{_key(source, form, whole)}.{'pixels' if whole else 'images'}"
    known = _found(path, source, form, whole) or _make(path, source, form, whole)
    if whole:
        pixels = np.memmap(path, np.uint8, "r", shape=(known["count"], *form.shape))
        return known, lambda indices: np.asarray(pixels[indices])
    known = {**known, "sha256": _marked(known["sha256"], form.key)}  # it is that of the encoded images
    if isinstance(source, ImageFolder):
        files = np.delete(np.array(source.files, object), known["left_out"])
        return known, lambda indices: _stacked((read_bytes(p) for p in files[indices]), indices, form)
    images = np.memmap(path, np.uint8, "r")
    ends = [0, *accumulate(known["lengths"])]
    return known, lambda indices: _stacked(
        (images[ends[i] : ends[i + 1]].tobytes() for i in indices), indices, form
    )


def _marked(digest: str, marks: list[Any]) -> str:
    """Return a digest that also stands for `marks`; the same one if there are none."""
    return hashlib.sha256(json.dumps([digest, *marks]).encode()).hexdigest() if marks else digest


def _stacked(encoded: Iterable[bytes], indices: np.ndarray, form: Form) -> np.ndarray:
    out = np.empty((len(indices), *form.shape), np.uint8)
    for place, (_, pixels) in enumerate(_all_decoded(encoded, form)):
        if pixels is None:
            raise UpcycleError(
                f"image {indices[place]} can no longer be decoded; the data changed while it was in use: "
                f"put it back as it was, or start again"
            )
        out[place] = pixels
    return out


def _key(source: ImageFiles, form: Form, whole: bool) -> str:
    """Hash what the pixels depend on: the files by name, size and time, and the way of decoding."""
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in source.files]
    text = json.dumps([FORMAT, stats, list(form.shape), source.columns[:1], whole, *form.key])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _found(path: Path, source: ImageFiles, form: Form, whole: bool) -> dict[str, Any] | None:
    """Return the description of images prepared before; None if it is missing or damaged.

    Images of older versions, which do not say what they were made from, are made anew.
    """
    try:
        known = json.loads(path.with_suffix(".json").read_text())
        size = known["count"] * int(np.prod(form.shape)) if whole else sum(known["lengths"])
        if known["count"] + len(known["left_out"]) != len(source.labels):
            return None
        if (whole or isinstance(source, ImageParquet)) and path.stat().st_size != size:
            return None
        if "sha256" not in known or not _is_of(known, source):
            return None
        damaged = whole and file_hash(path) != known["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if damaged:
        progress.say(f"{path} is damaged; it is made anew")
        return None
    return dict(known)


def _is_of(known: dict[str, Any], source: ImageFiles) -> bool:
    """Return whether images were made from the current files."""
    if stamp_of_all(source.files) == known["stamp"]:
        return True
    return _joined(file_hash(path) for path in source.files) == known["content"]


def _joined(hashes: Iterable[str]) -> str:
    """Return one hash of the hashes of many files, in order."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


@dataclass(kw_only=True)
class _Decoded:
    """The images of a set that have been decoded."""

    keeps_pixels: bool
    count: int = 0
    left_out: list[int] = field(default_factory=list)  # images that cannot be decoded
    lengths: list[int] = field(default_factory=list)  # bytes of the encoded images, if these are kept
    digest: Any = field(default_factory=hashlib.sha256)  # of the pixels, or of the encoded images
    hashes: list[str] = field(default_factory=list)  # of the files

    def take(self, source: ImageFiles, number: int, data: bytes, pixels: np.ndarray | None) -> bytes:
        """Note image `number`, and return what is kept of it."""
        if isinstance(source, ImageFolder):  # an image is a file
            self.hashes.append(hashlib.sha256(data).hexdigest())
        if pixels is None:
            self.left_out.append(number)
            return b""
        self.count += 1
        kept = pixels.tobytes() if self.keeps_pixels else data
        self.digest.update(kept)
        if self.keeps_pixels:
            return kept
        if isinstance(source, ImageFolder):
            return b""  # it is read from its own file
        self.lengths.append(len(kept))
        return kept


def _make(path: Path, source: ImageFiles, form: Form, whole: bool) -> dict[str, Any]:
    """Decode all images, and keep the pixels in `path`, or the encoded images of a parquet file."""
    before, made = stamp_of_all(source.files), _Decoded(keeps_pixels=whole)
    with _kept(path, whole or isinstance(source, ImageParquet)) as file:
        with _decoding(source) as work:
            for number, (data, pixels) in enumerate(_all_decoded(source.encoded(), form)):
                work.advance(len(data))
                file.write(made.take(source, number, data, pixels))
        if not made.count:
            raise UpcycleError(
                f"none of the {len(made.left_out)} images can be decoded, the first being "
                f"{source.where(0)}; give images that Pillow opens"
            )
        if isinstance(source, ImageParquet):
            made.hashes = [file_hash(each) for each in source.files]
        if stamp_of_all(source.files) != before:
            raise UpcycleError(f"the files of {source.where(0)} changed while they were read; begin again")
    known: dict[str, Any] = {"count": made.count, "left_out": made.left_out, "lengths": made.lengths}
    known |= {"sha256": made.digest.hexdigest(), "stamp": before, "content": _joined(made.hashes)}
    made_from = {"format": FORMAT, "shape": list(form.shape), "prepared": form.key, "first": source.where(0)}
    whole_file.write_json(path.with_suffix(".json"), {**known, "made_from": made_from})
    return known


def _kept(path: Path, keeps: bool) -> AbstractContextManager[IO[bytes]]:
    """Return the file that becomes `path`, or one that nobody keeps."""
    return whole_file.filling(path) if keeps else nullcontext(io.BytesIO())


def _decoding(source: ImageFiles) -> AbstractContextManager[Work]:
    first = source.files[0]
    name = first.name if isinstance(source, ImageParquet) else source.root.name
    return progress.work(f"decoding {name}", "bytes", total=sum(p.stat().st_size for p in source.files))
