"""Sources of labelled images: parquet files, or a folder with one subfolder per class."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.data.class_labels import common, names_in
from upcycle.data.folders import files_below
from upcycle.errors import UpcycleError, listed

ENDINGS = (  # in common use; Pillow reads them, unless it was built without
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jp2", ".avif", ".tga",
)  # fmt: skip
_ROWS = 64  # rows of a parquet file in memory at a time
_SPLITS = {"train", "test", "val", "valid", "validation"}


def pillow() -> Any:
    """Return Pillow's module of images. Raises `UpcycleError` if it is not installed."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise UpcycleError("images need pillow: pip install 'upcycle[vision]'") from None
    return Image


@lru_cache
def endings() -> tuple[str, ...]:
    """Return the endings of images in folders: those in common use that this Pillow can read."""
    known = pillow().registered_extensions()
    return tuple(ending for ending in ENDINGS if known.get(ending) in pillow().OPEN)


@dataclass(frozen=True)
class ImageFolder:
    """A folder ROOT/CLASS/IMAGE. Classes are sorted by name, and an empty one counts too."""

    root: Path
    columns = ()  # the columns to read; a folder has none

    @property
    def endings(self) -> tuple[str, ...]:
        """The endings of the files that are read."""
        return endings()

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes in the order of their numbers; empty if the data has none."""
        return tuple(sorted(p.name for p in self.root.iterdir() if p.is_dir() and p.name[0] != "."))

    @cached_property
    def _images(self) -> list[tuple[Path, int]]:
        """All images with the numbers of their classes."""
        return [
            (path, label)
            for label, name in enumerate(self.class_names)
            for path in files_below(self.root / name)
            if path.suffix.lower() in self.endings
        ]

    @property
    def files(self) -> list[Path]:
        """All files to read."""
        return [path for path, _ in self._images]

    @property
    def labels(self) -> np.ndarray:
        """The class number of each image, int64 [N]."""
        return np.array([label for _, label in self._images], np.int64)

    def where(self, number: int) -> str:
        """Return the location of an image, for messages."""
        return str(self._images[number][0])

    def encoded(self) -> Iterator[bytes]:
        """Yield every image as stored, in order."""
        return map(read_bytes, self.files)


@dataclass(frozen=True)
class ImageParquet:
    """Parquet files as Hugging Face writes them: images as {bytes, path} or bytes, labels as integers."""

    files: list[Path]
    image: str
    label: str
    endings = (".parquet",)

    @property
    def columns(self) -> tuple[str, str]:
        return self.image, self.label

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return common((path, self._names(path)) for path in self.files)

    def _names(self, path: Path) -> tuple[str, ...]:
        with _rows(path) as file:
            self._check(path, file.schema_arrow)
            return names_in(file.schema_arrow, self.label)

    @cached_property
    def _counts(self) -> list[int]:
        """The number of rows in each file."""
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
                f"a label is a whole number of 0 or more{most}: take the row out, or in a "
                f"run, set label_field"
            )
        return values

    def _check(self, path: Path, schema: Any) -> None:
        types = _pyarrow().types
        for key, name in (("image_field", self.image), ("label_field", self.label)):
            if name not in schema.names:
                raise UpcycleError(
                    f"{path} has no column {name!r}; it has {listed(schema.names, 8)}: give one the "
                    f"name, or in a run, set {key}"
                )
        kind = schema.field(self.image).type
        if types.is_struct(kind) and "bytes" in {kind.field(i).name for i in range(kind.num_fields)}:
            kind = kind.field("bytes").type
        if not (types.is_binary(kind) or types.is_large_binary(kind)):
            raise UpcycleError(
                f"{path}: column {self.image!r} is of type {kind}; images are encoded files, as binary or "
                f"struct<bytes, path>; in a run, set image_field"
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
                for batch in file.iter_batches(batch_size=_ROWS, columns=[self.image]):
                    for value in batch.column(0).to_pylist():
                        # A missing image counts as one that cannot be decoded.
                        yield (value.get("bytes") if isinstance(value, dict) else value) or b""


ImageFiles = ImageFolder | ImageParquet


def images_at(path: Path, image_field: str, label_field: str) -> ImageFiles:
    """Return the images at `path`. Raises `UpcycleError` if there are none."""
    if path.is_file() and path.suffix.lower() == ".parquet":
        source: ImageFiles = ImageParquet([path], image_field, label_field)
    elif path.is_dir():
        rows = [p for p in files_below(path) if p.suffix.lower() == ".parquet"]
        source = ImageParquet(rows, image_field, label_field) if rows else ImageFolder(path)
        _one_split(path, rows or [path / name for name in source.class_names])
    else:
        what = "is neither a parquet file nor a folder" if path.exists() else "is not there"
        raise UpcycleError(
            f"{path} {what}; images come as a parquet file, a folder of them, or a folder of class folders"
        )
    if not len(source.labels):
        raise UpcycleError(
            f"{path} holds no images; put them in one folder a class, as CLASS/NAME with one of the endings "
            f"{', '.join(endings())}, or give parquet files with rows"
        )
    return source


def _one_split(root: Path, parts: list[Path]) -> None:
    """Refuse a folder that mixes several splits, such as train and test."""
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
    """Open a parquet file."""
    pyarrow = _pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UpcycleError(f"{path} is no whole parquet file: {str(error).splitlines()[0]}") from None


def read_bytes(path: Path) -> bytes:
    """Read an encoded image. Raises `UpcycleError` if that fails."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UpcycleError(f"{path} cannot be read: {error.strerror}") from None
