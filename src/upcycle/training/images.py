"""Images with labels, decoded once: a parquet file, a folder of them, or a folder of class folders.

`KEY.pixels` holds the decoded images, mapped into memory; `KEY.json`, written last, says what they are. Where
they would take more than `CACHE_LIMIT`, images are decoded when they are read, and the first pass only finds
those that cannot be; it leaves `KEY.images`, the encoded images of a parquet file one after another.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from upcycle.console import bytes_bar
from upcycle.errors import UpcycleError, listed
from upcycle.training.examples import refuse_other_classes

FORMAT = 1
CACHE_LIMIT = 8 << 30  # bytes of decoded images that are kept
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CHUNK = 64  # images in flight
_THREADS = 8
_SPLITS = {"train", "test", "val", "valid", "validation"}

Size = tuple[int, int]  # height, width
Read = Callable[[np.ndarray], np.ndarray]  # int64 [B] -> uint8 [B, H, W, C]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Images of one size and their labels."""

    name: str
    size: Size
    channels: int
    labels: np.ndarray  # int64 [N]
    class_names: tuple[str, ...]  # empty where the data does not say
    num_labels: int
    bad: tuple[str, ...]  # images that cannot be decoded and are left out: FILE, or FILE, row N
    _read: Read = field(repr=False)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        size: Size,
        channels: int,
        image_field: str = "image",
        label_field: str = "label",
        cache: Path,
    ) -> ImageSet:
        """The images at `path`: the shorter side resized to `size` [H, W], the centre cut out.

        One process calls it first; the others find its work in the folder `cache`. Raises `UpcycleError` for
        data that cannot be used.
        """
        if channels not in (1, 3) or min(size) < 1:
            raise UpcycleError(
                f"images of {size[0]} x {size[1]} pixels and {channels} channels; a side must be 1 or more, "
                f"and there are 1 channel (grey) or 3 (red, green, blue)"
            )
        _pillow()
        source = _opened(Path(path), image_field, label_field)
        shape = (*size, channels)
        names, labels = source.class_names, source.labels
        known, read = _prepared(source, shape, cache)
        return cls(
            name=str(path),
            size=size,
            channels=channels,
            labels=np.delete(labels, known["left_out"]),
            class_names=names,
            num_labels=len(names) or int(labels.max()) + 1,
            bad=tuple(source.where(i) for i in known["left_out"]),
            _read=read,
        )

    kind: ClassVar[str] = "images"

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The images numbered `indices`: pixels uint8 [B, H, W, C], labels int64 [B]."""
        return {"pixels": self.read(indices), "labels": self.labels[indices]}

    def refuse(self, held_out: ImageSet) -> None:
        """Refuse a set to score on that does not go with this one."""
        a, b = ((*s.size, s.channels) for s in (self, held_out))
        if a != b:
            raise UpcycleError(
                f"{self.name} is of images {a} and {held_out.name} of images {b}; open both with one size"
            )
        refuse_other_classes(self, held_out)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The pixels of the images numbered `indices`: uint8 [B, H, W, C]."""
        return self._read(np.asarray(indices, np.int64))


# --- where images come from


@dataclass(frozen=True)
class _Folder:
    """ROOT/CLASS/IMAGE: classes sorted by name, an empty one counts as well."""

    root: Path
    columns = ()

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return tuple(sorted(p.name for p in self.root.iterdir() if p.is_dir() and p.name[0] != "."))

    @cached_property
    def _images(self) -> list[tuple[Path, int]]:
        """Each image and the number of its class."""
        return [
            (path, label)
            for label, name in enumerate(self.class_names)
            for path in sorted((self.root / name).rglob("*"))
            if path.suffix.lower() in ENDINGS and path.is_file()
        ]

    @property
    def files(self) -> list[Path]:
        return [path for path, _ in self._images]

    @property
    def labels(self) -> np.ndarray:
        return np.array([label for _, label in self._images], np.int64)

    def where(self, number: int) -> str:
        return str(self._images[number][0])

    def encoded(self) -> Iterator[bytes]:
        return map(_bytes, self.files)


@dataclass(frozen=True)
class _Parquet:
    """Parquet files as Hugging Face writes them: images as {bytes, path} or bytes, labels as integers."""

    files: list[Path]
    image: str
    label: str

    @property
    def columns(self) -> tuple[str, str]:
        return self.image, self.label

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        found = {}
        for path in self.files:
            with _rows(path) as file:
                self._check(path, file.schema_arrow)
                if names := _class_names(file.schema_arrow.metadata or {}, self.label):
                    found[names] = path
        if len(found) > 1:
            first, second = list(found.values())[:2]
            raise UpcycleError(f"{first} and {second} name other classes; give files of one data set")
        return next(iter(found), ())

    @cached_property
    def _counts(self) -> list[int]:
        """Rows of each file."""
        counts = []
        for path in self.files:
            with _rows(path) as file:
                counts.append(int(file.metadata.num_rows))
        return counts

    @cached_property
    def labels(self) -> np.ndarray:
        return np.concatenate([self._labels(path) for path in self.files])

    def _labels(self, path: Path) -> np.ndarray:
        pyarrow = _pyarrow()
        with _rows(path) as file:
            self._check(path, file.schema_arrow)
            column = file.read(columns=[self.label]).column(0)
        whole = pyarrow.types.is_integer(column.type)
        if whole:
            values = column.cast(pyarrow.int64(), safe=False).fill_null(-1).to_numpy()
        else:
            values = np.full(len(column), -1)
        allowed = len(self.class_names) or 1 << 62
        if len(wrong := np.flatnonzero((values < 0) | (values >= allowed))):
            most = f" less than {allowed}, the number of its class names" if self.class_names else ""
            raise UpcycleError(
                f"{path}, row {wrong[0]} has the label {column[int(wrong[0])].as_py()!r} in {self.label!r}; "
                f"a label is a whole number of 0 or more{most}: take the row out, or set label_field"
            )
        return values

    def _check(self, path: Path, schema: Any) -> None:
        types = _pyarrow().types
        for key, name in (("image_field", self.image), ("label_field", self.label)):
            if name not in schema.names:
                raise UpcycleError(
                    f"{path} has no column {name!r}; it has {listed(schema.names, 8)}: set {key}"
                )
        kind = schema.field(self.image).type
        if types.is_struct(kind) and "bytes" in {kind.field(i).name for i in range(kind.num_fields)}:
            kind = kind.field("bytes").type
        if not (types.is_binary(kind) or types.is_large_binary(kind)):
            raise UpcycleError(
                f"{path}: column {self.image!r} is of type {kind}; images are encoded files, as binary or "
                f"struct<bytes, path>: set image_field"
            )

    def where(self, number: int) -> str:
        for path, count in zip(self.files, self._counts, strict=True):
            if number < count:
                return f"{path}, row {number}"
            number -= count
        raise IndexError(number)

    def encoded(self) -> Iterator[bytes]:
        for path in self.files:
            with _rows(path) as file:
                for batch in file.iter_batches(batch_size=_CHUNK, columns=[self.image]):
                    for value in batch.column(0).to_pylist():
                        # An image that is not there is one that cannot be decoded.
                        yield (value.get("bytes") if isinstance(value, dict) else value) or b""


_Source = _Folder | _Parquet


def _opened(path: Path, image_field: str, label_field: str) -> _Source:
    if path.is_file() and path.suffix == ".parquet":
        source: _Source = _Parquet([path], image_field, label_field)
    elif path.is_dir():
        rows = sorted(p for p in path.rglob("*.parquet") if p.is_file())
        source = _Parquet(rows, image_field, label_field) if rows else _Folder(path)
        _one_split(path, rows or [path / name for name in source.class_names])
    else:
        what = "is neither a parquet file nor a folder" if path.exists() else "is not there"
        raise UpcycleError(
            f"{path} {what}; images come as a parquet file, a folder of them, or a folder of class folders"
        )
    if not len(source.labels):
        raise UpcycleError(
            f"{path} holds no images; put them in one folder a class, as CLASS/NAME with one of the endings "
            f"{', '.join(ENDINGS)}, or give parquet files with rows"
        )
    return source


def _one_split(root: Path, parts: list[Path]) -> None:
    """Refuse a folder whose files or classes are called train and test."""
    words = [set(re.split(r"[^a-z]+", str(p.relative_to(root).with_suffix("")).lower())) for p in parts]
    splits = sorted({" ".join(sorted(found)) for w in words if (found := w & _SPLITS)})
    if len(splits) > 1:
        raise UpcycleError(
            f"{root} holds the splits {listed(splits)}; give the file of one of them, or a folder that holds "
            f"only that"
        )


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UpcycleError("images in parquet need pyarrow: pip install 'upcycle[vision]'") from None
    return pyarrow


@contextmanager
def _rows(path: Path) -> Iterator[Any]:
    """An open parquet file."""
    pyarrow = _pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise UpcycleError(f"{path} is no whole parquet file: {str(error).splitlines()[0]}") from None


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """The names that `datasets` keeps in a schema for a ClassLabel; empty where there are none."""
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][label]
        return tuple(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else ()
    except (KeyError, TypeError, ValueError):
        return ()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UpcycleError(f"{path} cannot be read: {error.strerror}") from None


# --- from bytes to pixels


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise UpcycleError("images need pillow: pip install 'upcycle[vision]'") from None
    return Image


def decoded(data: bytes, shape: tuple[int, int, int]) -> np.ndarray | None:
    """An encoded image as uint8 [H, W, C]; None where it cannot be decoded."""
    image_module = _pillow()
    try:
        with image_module.open(io.BytesIO(data)) as opened:
            image = opened
            if image.mode.startswith("I;16"):  # Pillow's own conversion cuts 16 bits off at 255
                image = image_module.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("L" if shape[2] == 1 else "RGB")
    except MemoryError:
        raise
    except Exception:  # the decoders of Pillow raise whatever a broken file leads them to
        return None
    height, width = shape[:2]
    if image.width * height <= image.height * width:
        resized = width, max(height, image.height * width // image.width)
    else:
        resized = max(width, image.width * height // image.height), height
    if resized != image.size:
        image = image.resize(resized, image_module.Resampling.BICUBIC)
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    return np.asarray(image).reshape(*image.size[::-1], shape[2])[top : top + height, left : left + width]


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "images")


def _all_decoded(
    encoded: Iterable[bytes], shape: tuple[int, int, int]
) -> Iterator[tuple[bytes, np.ndarray | None]]:
    """Every image of `encoded` and its pixels, in order, by several threads."""
    stream = iter(encoded)
    while chunk := list(islice(stream, _CHUNK)):
        yield from zip(chunk, _pool().map(partial(decoded, shape=shape), chunk), strict=True)


# --- what is kept


def _prepared(source: _Source, shape: tuple[int, int, int], cache: Path) -> tuple[dict[str, Any], Read]:
    """What is known of the images, from the cache or put there; and what reads them."""
    whole = len(source.labels) * int(np.prod(shape)) <= CACHE_LIMIT
    path = cache / f"{_key(source, shape, whole)}.{'pixels' if whole else 'images'}"
    known = _found(path, source, shape, whole) or _make(path, source, shape, whole)
    if whole:
        pixels = np.memmap(path, np.uint8, "r", shape=(known["count"], *shape))
        return known, lambda indices: np.asarray(pixels[indices])
    if isinstance(source, _Folder):
        files = np.delete(np.array(source.files, object), known["left_out"])
        return known, lambda indices: _stacked((_bytes(p) for p in files[indices]), indices, shape)
    images = np.memmap(path, np.uint8, "r")
    ends = [0, *accumulate(known["lengths"])]
    return known, lambda indices: _stacked(
        (images[ends[i] : ends[i + 1]].tobytes() for i in indices), indices, shape
    )


def _stacked(encoded: Iterable[bytes], indices: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    out = np.empty((len(indices), *shape), np.uint8)
    for place, (_, pixels) in enumerate(_all_decoded(encoded, shape)):
        if pixels is None:
            raise UpcycleError(
                f"image {indices[place]} can no longer be decoded; the data changed while it was in use: "
                f"put it back as it was, or start again"
            )
        out[place] = pixels
    return out


def _key(source: _Source, shape: Sequence[int], whole: bool) -> str:
    """What the pixels depend on: the files by name, size and time, and how they are decoded."""
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in source.files]
    text = json.dumps([FORMAT, stats, list(shape), source.columns[:1], whole])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _found(path: Path, source: _Source, shape: Sequence[int], whole: bool) -> dict[str, Any] | None:
    """What is known of images as they were prepared before; None where that is not there or not whole."""
    try:
        known = json.loads(path.with_suffix(".json").read_text())
        size = known["count"] * int(np.prod(shape)) if whole else sum(known["lengths"])
        if known["count"] + len(known["left_out"]) != len(source.labels):
            return None
        if (whole or isinstance(source, _Parquet)) and path.stat().st_size != size:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(known)


def _make(path: Path, source: _Source, shape: tuple[int, int, int], whole: bool) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Runs that share a cache may make the same file at the same time: each its own, the last one stays.
    started = path.with_suffix(f".{os.getpid()}.partial")
    left_out: list[int] = []
    lengths: list[int] = []
    count = 0
    try:
        with started.open("wb") as file, _bar(source) as advance:
            for number, (data, pixels) in enumerate(_all_decoded(source.encoded(), shape)):
                advance(len(data))
                if pixels is None:
                    left_out.append(number)
                    continue
                count += 1
                if whole:
                    file.write(pixels.tobytes())
                elif isinstance(source, _Parquet):
                    file.write(data)
                    lengths.append(len(data))
            _sync(file)
        if not count:
            raise UpcycleError(
                f"none of the {len(left_out)} images can be decoded, the first being {source.where(0)}; "
                f"give images that Pillow opens"
            )
        if whole or lengths:
            started.rename(path)
        known = {"count": count, "left_out": left_out, "lengths": lengths}
        made_from = {"format": FORMAT, "shape": list(shape), "first": source.where(0)}
        with started.open("w") as about:
            about.write(json.dumps({**known, "made_from": made_from}))
            _sync(about)
        started.rename(path.with_suffix(".json"))
    finally:
        started.unlink(missing_ok=True)
    return known


@contextmanager
def _bar(source: _Source) -> Iterator[Callable[[int], None]]:
    first = source.files[0]
    name = first.name if isinstance(source, _Parquet) else source.root.name
    with bytes_bar(f"decoding {name}") as (advance, set_end):
        set_end(sum(p.stat().st_size for p in source.files))
        yield advance


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
