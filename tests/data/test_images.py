"""Images are decoded once, as Pillow decodes them; come once an epoch; are augmented as their targets say."""

from __future__ import annotations

import builtins
import dataclasses
import importlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from conftest import SHARED
from upcycle import settings
from upcycle.data import augmentation, image_files, images
from upcycle.data.augment import Augment
from upcycle.data.examples import Examples
from upcycle.data.images import ImageSet
from upcycle.data.readings import Reading
from upcycle.errors import UpcycleError
from upcycle.tensors import rng

Open = Callable[..., ImageSet]


def picture(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    """A smooth picture of width and height `size`."""
    rough = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BILINEAR).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def write_parquet(
    path: Path,
    contents: list[bytes | None],
    labels: Any,
    *,
    names: list[str] | None = None,
    fields: tuple[str, str] = ("image", "label"),
    plain: bool = False,
) -> Path:
    rows = contents if plain else [{"bytes": c, "path": None} for c in contents]
    kind = (
        pyarrow.binary() if plain else pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    )
    table = pyarrow.table({fields[0]: pyarrow.array(rows, kind), fields[1]: labels})
    if names:
        features = {fields[0]: {"_type": "Image"}, fields[1]: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    plainly = {"compression": "none", "write_statistics": False, "use_dictionary": False}  # equal sizes
    pyarrow.parquet.write_table(table, path, row_group_size=3, **plainly)
    return path


def write_folder(root: Path, contents: list[bytes], labels: list[int], ending: str = "png") -> Path:
    for number, (content, label) in enumerate(zip(contents, labels, strict=True)):
        path = root / f"class_{label}" / f"{number:03}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """A function that opens images of 8 x 8 pixels."""

    def make(path: Path, **options: Any) -> ImageSet:
        return ImageSet.open(path, **{"size": (8, 8), "channels": 3, "cache": tmp_path / "cache"} | options)

    return make


@pytest.fixture(params=["kept", "on demand"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether decoded images are kept, or decoded when they are read."""
    if request.param == "on demand":
        monkeypatch.setattr(images, "CACHE_LIMIT", 0)
    return request.param == "kept"


LABELS = [0, 0, 1, 1, 1, 2, 2]
PICTURES = [picture(i) for i in range(len(LABELS))]


# --- files -> images


@pytest.mark.parametrize("kind", ["folder", "parquet", "plain parquet", "folder of parquet"])
def test_every_kind_gives_the_same_images(kind: str, kept: bool, opened: Open, tmp_path: Path) -> None:
    contents = [encoded(p) for p in PICTURES]
    path = tmp_path / "data"
    if kind == "folder":
        write_folder(path, contents, LABELS)
    elif kind == "folder of parquet":
        (path / "deep").mkdir(parents=True)
        write_parquet(path / "a.parquet", contents[:2], LABELS[:2])
        write_parquet(path / "deep" / "b.parquet", contents[2:], LABELS[2:])
    else:
        path = write_parquet(tmp_path / "a.parquet", contents, LABELS, plain=kind == "plain parquet")
    found = opened(path)
    assert len(found) == len(LABELS)
    assert found.labels.tolist() == LABELS
    assert found.labels.dtype == np.int64
    assert found.num_labels == 3
    assert found.class_names == (("class_0", "class_1", "class_2") if kind == "folder" else ())
    assert found.bad == ()
    order = np.array([6, 0, 3, 3])
    pixels = found.read(order)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (4, 8, 8, 3))
    np.testing.assert_array_equal(pixels, [np.asarray(PICTURES[i]) for i in order])
    assert found.read(np.zeros(0, int)).shape == (0, 8, 8, 3)
    assert bool(list((tmp_path / "cache").glob("*.pixels"))) == kept
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.parametrize("kind", ["png", "jpg", "jpeg", "webp", "bmp", "PNG"])
def test_every_format(kind: str, opened: Open, tmp_path: Path) -> None:
    content = encoded(PICTURES[0], {"jpg": "JPEG"}.get(kind, kind.upper()))
    write_folder(tmp_path / "data", [content], [0], kind)
    (tmp_path / "data" / "class_0" / "readme.txt").write_text("not an image")
    (tmp_path / "data" / ".hidden").mkdir()
    pixels = opened(tmp_path / "data").read(np.arange(1))
    np.testing.assert_array_equal(pixels[0], np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize(("given", "size"), [((8, 8), (8, 8)), ((31, 17), (8, 8)), ((9, 40), (8, 12))])
def test_resized_to_the_shorter_side_and_cut_at_the_centre(
    given: tuple[int, int], size: tuple[int, int], opened: Open, tmp_path: Path
) -> None:
    image = picture(1, given)
    pixels = opened(write_folder(tmp_path / "data", [encoded(image)], [0]), size=size).read(np.arange(1))[0]
    resized, corner = {
        (8, 8): ((8, 8), (0, 0)),
        (31, 17): ((14, 8), (3, 0)),  # 8 * 31 / 17 = 14.6
        (9, 40): ((12, 53), (0, 22)),  # 12 * 40 / 9 = 53.3; the middle of 45 rows too many, to even
    }[given]
    wanted = image.resize(resized, Image.Resampling.BICUBIC)
    box = (*corner, corner[0] + size[1], corner[1] + size[0])
    np.testing.assert_array_equal(pixels, np.asarray(wanted.crop(box)))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "LA", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_and_grey(mode: str, channels: int, opened: Open, tmp_path: Path) -> None:
    if mode == "I;16":
        grey = np.asarray(picture(2, mode="L"))
        image, wanted = Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey)
    else:
        image = wanted = picture(2).convert(mode)
    path = write_folder(tmp_path / "data", [encoded(image)], [0])
    pixels = opened(path, channels=channels).read(np.arange(1))
    assert pixels.shape == (1, 8, 8, channels)
    converted = wanted.convert("L" if channels == 1 else "RGB")
    np.testing.assert_array_equal(pixels.squeeze(), np.asarray(converted))


@pytest.mark.parametrize(
    ("kind", "format"), [("gif", "GIF"), ("tif", "TIFF"), ("TIFF", "TIFF"), ("ppm", "PPM")]
)
def test_formats_of_other_endings(kind: str, format: str, opened: Open, tmp_path: Path) -> None:
    """Of several images in a file, the first counts."""
    first, second = (p.quantize(16) if kind == "gif" else p.copy() for p in PICTURES[:2])
    out = io.BytesIO()
    more = {} if kind == "ppm" else {"save_all": True, "append_images": [second]}
    first.save(out, format, **more)
    found = opened(write_folder(tmp_path / "data", [out.getvalue()], [0], kind))
    np.testing.assert_array_equal(found.read(np.arange(1))[0], np.asarray(first.convert("RGB")))


def test_endings_are_those_that_pillow_reads() -> None:
    for ending in image_files.endings():
        assert Image.registered_extensions()[ending] in Image.OPEN
    assert {".png", ".jpg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"} <= set(image_files.endings())


def test_files_that_are_not_read_are_counted(opened: Open, tmp_path: Path, caplog) -> None:
    path = write_folder(tmp_path / "data", [encoded(PICTURES[0])], [0])
    opened(path)
    assert "not read" not in caplog.text
    for name in ("class_0/a.svg", "class_0/B.SVG", "labels.csv", "class_0/.DS_Store"):
        (path / name).write_text("no image")
    caplog.set_level("INFO", "upcycle")
    assert len(opened(path)) == 1
    assert "3 files are not read, because of their endings (.SVG, .csv, .svg); those with .png" in caplog.text
    write_parquet(path / "a.parquet", [encoded(PICTURES[0])], [0])
    opened(path)
    assert "4 files are not read" in caplog.text
    assert "those with .parquet are" in caplog.text


def test_images_behind_links_are_read(opened: Open, tmp_path: Path) -> None:
    contents = [encoded(p) for p in PICTURES[:4]]
    path = write_folder(tmp_path / "here", contents[:2], [0, 1])
    write_folder(tmp_path / "away", contents[2:], [0, 1])
    (path / "class_0" / "more").symlink_to(tmp_path / "away" / "class_0")
    (path / "class_2").symlink_to(tmp_path / "away" / "class_1")
    found = opened(path)
    assert found.labels.tolist() == [0, 0, 1, 2]
    wanted = np.stack([np.asarray(PICTURES[number]) for number in (0, 2, 1, 3)])
    np.testing.assert_array_equal(found.read(np.arange(4)), wanted)


def test_names_of_classes_and_columns(opened: Open, tmp_path: Path) -> None:
    contents = [encoded(p) for p in PICTURES[:2]]
    path = write_parquet(
        tmp_path / "a.parquet", contents, [1, 0], names=["cat", "dog", "fly"], fields=("img", "fine_label")
    )
    found = opened(path, image_field="img", label_field="fine_label")
    assert found.class_names == ("cat", "dog", "fly")
    assert found.num_labels == 3
    with pytest.raises(
        UpcycleError, match=r"no column 'image'; it has img, fine_label: .* in a run, set image_field"
    ):
        opened(path)
    with pytest.raises(UpcycleError, match=r"no column 'label'.*set label_field"):
        opened(path, image_field="img")
    with pytest.raises(UpcycleError, match=r"'fine_label' is of type int64; images are encoded"):
        opened(path, image_field="fine_label", label_field="fine_label")


def test_an_empty_class_counts(opened: Open, tmp_path: Path) -> None:
    write_folder(tmp_path / "data", [encoded(PICTURES[0])], [1])
    (tmp_path / "data" / "a").mkdir()
    found = opened(tmp_path / "data")
    assert (found.class_names, found.labels.tolist(), found.num_labels) == (("a", "class_1"), [1], 2)


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_images_that_cannot_be_decoded_are_left_out(
    kind: str, kept: bool, opened: Open, tmp_path: Path
) -> None:
    contents: list[Any] = [encoded(picture(i, (40, 40)), "JPEG") for i in range(100)]
    broken = {3: b"no image", 70: contents[70][: len(contents[70]) // 2], 99: b""}
    for place, content in broken.items():
        contents[place] = content
    labels = [i // 50 for i in range(100)]
    if kind == "folder":
        path = write_folder(tmp_path / "data", contents, labels)
        wanted = [str(path / f"class_{labels[i]}" / f"{i:03}.png") for i in broken]
    else:
        path = tmp_path / "data"
        path.mkdir()
        write_parquet(path / "a.parquet", contents[:60], labels[:60])
        write_parquet(path / "b.parquet", [*contents[60:99], None], labels[60:])
        wanted = [f"{path}/a.parquet, row 3", f"{path}/b.parquet, row 10", f"{path}/b.parquet, row 39"]
    for found in (opened(path), opened(path)):  # made, found again
        assert found.bad == tuple(wanted)
        good = [i for i in range(100) if i not in broken]
        assert found.labels.tolist() == [labels[i] for i in good]
        expected = [
            np.asarray(Image.open(io.BytesIO(contents[i])).resize((8, 8), Image.Resampling.BICUBIC))
            for i in good
        ]
        np.testing.assert_array_equal(found.read(np.arange(97)), expected)


def test_decoded_once(kept: bool, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [encoded(p) for p in PICTURES], LABELS)
    first = opened(path).read(np.arange(7))
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(images, "_make", None)  # whoever prepares them again fails
        again = opened(Path("a.parquet"))
    np.testing.assert_array_equal(again.read(np.arange(7)), first)
    made = sorted(p.suffix for p in (tmp_path / "cache").iterdir())
    assert made == [".json", ".pixels"] if kept else [".images", ".json"]


@pytest.mark.parametrize(
    "change", ["time", "content", "quietly", "size", "channels", "one more", "damage", "half"]
)
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_prepared_again_when_something_changed(
    kind: str, change: str, kept: bool, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(pictures: list[Image.Image]) -> Path:
        contents, labels = [encoded(p, "BMP") for p in pictures], LABELS[: len(pictures)]
        if kind == "folder":
            return write_folder(tmp_path / "data", contents, labels, "bmp")
        return write_parquet(tmp_path / "a.parquet", contents, labels)

    path = write(PICTURES[:6])
    opened(path)
    made = []
    monkeypatch.setattr(
        images,
        "_make",
        lambda *a, make=images._make: made.append(1) or make(*a),  # type: ignore[func-returns-value]
    )
    opened(path)
    assert not made
    options: dict[str, Any] = {}
    pictures = PICTURES[:6]
    if change == "time":
        write(pictures)
        for file in [path] if path.is_file() else path.rglob("*.bmp"):
            os.utime(file, ns=(1, 1))
    elif change == "content":
        pictures = PICTURES[1:7]
        write(pictures)
    elif change == "quietly":  # the size and the time are as they were
        files = [path] if path.is_file() else sorted(path.rglob("*.bmp"))
        before = [file.stat() for file in files]
        pictures = pictures[::-1]
        write(pictures)
        for file, was in zip(files, before, strict=True):
            os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
            assert file.stat().st_size == was.st_size
    elif change == "one more":
        pictures = PICTURES
        write(pictures)
    elif change == "size":
        options = {"size": (6, 6)}
    elif change == "channels":
        options = {"channels": 1}
    elif change == "damage":
        next((tmp_path / "cache").glob("*.json")).write_text('{"count": 6')
    elif files := [*(tmp_path / "cache").glob("*.pixels"), *(tmp_path / "cache").glob("*.images")]:
        files[0].write_bytes(files[0].read_bytes()[:-1])
    else:
        return  # of a folder whose images are decoded on demand, nothing is kept but the list
    found = opened(path, **options)
    assert made == [1]
    size, mode = options.get("size", (8, 8)), "L" if "channels" in options else "RGB"
    wanted = [np.asarray(p.convert(mode).resize(size, Image.Resampling.BICUBIC)) for p in pictures]
    np.testing.assert_array_equal(found.read(np.arange(len(pictures))).squeeze(), wanted)


def test_files_that_were_put_back_are_the_same(opened: Open, tmp_path: Path, kept: bool, monkeypatch) -> None:
    path = write_folder(tmp_path / "data", [encoded(p, "BMP") for p in PICTURES], LABELS, "bmp")
    first = opened(path).read(np.arange(7))
    shutil.copytree(path, tmp_path / "copy")  # with its times, as `cp -p` does
    shutil.rmtree(path)
    (tmp_path / "copy").rename(path)
    monkeypatch.setattr(images, "_make", None)
    np.testing.assert_array_equal(opened(path).read(np.arange(7)), first)


def test_files_that_change_while_they_are_decoded(opened: Open, tmp_path: Path, monkeypatch) -> None:
    path = write_folder(tmp_path / "data", [encoded(p, "BMP") for p in PICTURES], LABELS, "bmp")
    decoded, changed = images.decoded, next(path.rglob("*.bmp"))

    def slow(*args: Any, **options: Any) -> Any:
        changed.write_bytes(changed.read_bytes())
        return decoded(*args, **options)

    monkeypatch.setattr(images, "decoded", slow)
    assert "changed while they were read; begin again" in _error(opened, path)
    assert not list((tmp_path / "cache").iterdir())


# --- bad input: one sentence each


def _error(opened: Open, path: Path, **options: Any) -> str:
    with pytest.raises(UpcycleError) as caught:
        opened(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_nothing_there(opened: Open, tmp_path: Path) -> None:
    assert "is not there" in _error(opened, tmp_path / "no")
    (tmp_path / "a.txt").write_text("text")
    assert "neither a parquet file nor a folder" in _error(opened, tmp_path / "a.txt")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "loose.png").write_bytes(encoded(PICTURES[0]))
    assert "holds no images" in _error(opened, tmp_path / "data")
    assert "holds no images" in _error(
        opened, write_parquet(tmp_path / "a.parquet", [], pyarrow.array([], "int8"))
    )
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    assert "no whole parquet file" in _error(opened, tmp_path / "b.parquet")
    assert "2 channels" in _error(opened, tmp_path, channels=2)
    assert "0 x 8 pixels" in _error(opened, tmp_path, size=(0, 8))
    assert not (tmp_path / "cache").exists()


def test_all_images_bad(opened: Open, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [b"no", b""], [0, 1])
    assert "none of the 2 images can be decoded" in _error(opened, path)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, -1], "row 2 has the label -1"),
        ([0, None, 1], "row 1 has the label None"),
        (["a", "b", "c"], "row 0 has the label 'a'"),
        ([0.0, 1.0, 1.5], "row 0 has the label 0.0"),
        (pyarrow.array([0, 2**64 - 1, 1], "uint64"), "row 1 has the label 18446744073709551615"),
        ([0, 1, 3], "row 2 has the label 3 .* less than 3"),
    ],
)
def test_labels_that_are_none(labels: Any, said: str, opened: Open, tmp_path: Path) -> None:
    names = ["x", "y", "z"] if "less" in said else None
    path = write_parquet(tmp_path / "a.parquet", [encoded(p) for p in PICTURES[:3]], labels, names=names)
    with pytest.raises(UpcycleError, match=said):
        opened(path)


def test_several_splits_in_a_folder(opened: Open, tmp_path: Path) -> None:
    contents = [encoded(PICTURES[0])]
    (tmp_path / "rows").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        write_parquet(tmp_path / "rows" / f"{name}.parquet", contents, [0])
    assert len(opened(tmp_path / "rows")) == 2
    write_parquet(tmp_path / "rows" / "test-00000-of-00001.parquet", contents, [0])
    assert "the splits test, train" in _error(opened, tmp_path / "rows")
    for name in ("train", "val"):
        write_folder(tmp_path / "folders" / name, contents, [0])
    assert "the splits train, val" in _error(opened, tmp_path / "folders")


def test_files_of_two_data_sets(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("a", "b"):
        write_parquet(tmp_path / "rows" / f"{name}.parquet", [encoded(PICTURES[0])], [0], names=[name])
    assert "name other classes" in _error(opened, tmp_path / "rows")


@pytest.mark.parametrize("missing", ["PIL", "pyarrow"])
def test_packages_that_are_missing(
    missing: str, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", [encoded(PICTURES[0])], [0])
    _hide(monkeypatch, missing)
    assert "pip install 'upcycle[vision]'" in _error(opened, path)


def _hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    def without(name: str, *rest: Any, original: Any = builtins.__import__) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)


def test_data_that_goes_bad_in_use(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "CACHE_LIMIT", 0)
    path = write_folder(tmp_path / "data", [encoded(p) for p in PICTURES], LABELS)
    found = opened(path)
    (path / "class_0" / "001.png").write_bytes(b"")
    with pytest.raises(UpcycleError, match="image 1 can no longer be decoded"):
        found.read(np.array([0, 1]))
    (path / "class_0" / "001.png").unlink()
    with pytest.raises(UpcycleError, match=r"001.png cannot be read"):
        found.read(np.array([0, 1]))


# --- images -> batches


def numbered(n: int, name: str = "set", **changes: Any) -> ImageSet:
    """Images of one pixel that hold their number, labelled with its rest by 5."""
    numbers = np.arange(n)
    made = ImageSet(
        name=name,
        size=(1, 1),
        channels=3,
        labels=numbers % 5,
        class_names=(),
        num_labels=5,
        bad=(),
        digest=str(n),
        _read=lambda indices: np.stack([indices % 256, indices // 256, indices * 0], -1).astype(np.uint8)[
            :, None, None, :
        ],
    )
    return dataclasses.replace(made, **changes)


def numbers(batch: dict[str, np.ndarray]) -> list[int]:
    pixels = batch["pixels"].astype(int)
    found = pixels[:, 0, 0, 0] + 256 * pixels[:, 0, 0, 1]
    np.testing.assert_array_equal(batch["labels"], found % 5)
    assert batch["labels"].dtype == np.int64
    return found.tolist()


def batches(
    n: int = 20, share: float = 0.0, seed: int = 0, held_out: ImageSet | None = None, split_seed: int = 0
) -> Examples:
    return Examples(numbered(n), held_out, held_out_share=share, seed=seed, split_seed=split_seed)


def test_examples_are_sorted_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked, real = batches(20), list[Any](), rng.permutation
    monkeypatch.setattr(rng, "permutation", lambda key, n: asked.append(key) or real(key, n))
    for _ in range(9):
        made.next(5)
    assert len(asked) == math.ceil(made.epochs[0]) == 3


def test_every_image_once_an_epoch_in_another_order() -> None:
    made = batches(300)
    epochs = [numbers(made.next(300)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(300)) for epoch in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert made.epochs == [3.0]
    assert made.trainable == [300]
    assert numbers(batches(300, seed=1).next(300)) != epochs[0]


def test_two_feeds_of_a_set_go_on_from_each_other() -> None:
    reading = Reading()
    first, second = (
        Examples(numbered(20), None, held_out_share=0.2, seed=0, reading=reading) for _ in range(2)
    )
    alone = batches(20, 0.2)
    found = numbers(first.next(5)) + numbers(second.next(8)) + numbers(first.next(5))
    assert found == numbers(alone.next(18))
    assert first.state() == second.state() == alone.state()


def test_the_order_is_pinned() -> None:
    """A run that is gone on with under a later version must see the same images."""
    assert numbers(batches(20, 0.2, seed=7, split_seed=7).next(12)) == PINNED


PINNED = [13, 4, 10, 12, 16, 18, 0, 17, 2, 15, 1, 7]


def test_sizes_of_batches_do_not_matter() -> None:
    """A batch may cross the end of an epoch, or several."""
    whole = numbers(batches(7).next(60))
    made = batches(7)
    assert sum((numbers(made.next(n)) for n in (1, 0, 5, 30, 3, 21)), []) == whole  # noqa: RUF017


def test_resumed_at_every_position() -> None:
    whole = numbers(batches(20, 0.25).next(40))
    made = batches(20, 0.25)
    for position in range(40):
        state = json.loads(json.dumps(made.state()))
        other = batches(20, 0.25)
        other.restore(state)
        assert numbers(other.next(40 - position)) == whole[position:]
        assert made.state() == state
        made.next(1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_read_parts_of_the_same_batches(ranks: int) -> None:
    whole, parts = batches(30), [batches(30) for _ in range(ranks)]
    share = 8 // ranks
    for _ in range(10):
        read = [p.next(8, slice(i * share, (i + 1) * share)) for i, p in enumerate(parts)]
        assert sum((numbers(r) for r in read), []) == numbers(whole.next(8))  # noqa: RUF017
    assert all(p.state() == whole.state() for p in parts)


def test_a_rank_reads_only_its_part() -> None:
    read: list[int] = []
    images = numbered(20, _read=lambda i: read.extend(i) or np.zeros((len(i), 1, 1, 3)))
    Examples(images, None, held_out_share=0.0, seed=0).next(16, slice(4, 8))
    assert len(read) == 4


def test_held_out_images_are_never_trained_on() -> None:
    made = batches(100, 0.2)
    kept = numbers(made.held_out())
    trained = numbers(made.next(160))
    assert (len(kept), made.trainable) == (20, [80])
    assert sorted({*trained, *kept}) == list(range(100))
    assert not {*trained} & {*kept}
    before = made.state()
    assert numbers(made.held_out()) == numbers(batches(100, 0.2).held_out()) == kept
    assert numbers(made.held_out(5)) == kept[::4]
    assert numbers(made.held_out(1000)) == kept
    assert made.state() == before
    assert kept != list(range(80, 100))  # classes come one after another in a folder
    assert numbers(batches(100, 0.2, seed=1).held_out()) == kept  # so that seeds can be compared
    assert numbers(batches(100, 0.2, split_seed=1).held_out()) != kept
    assert numbers(batches().held_out()) == []


def test_a_set_of_its_own_to_hold_out() -> None:
    made = batches(20, 0.5, held_out=numbered(12, "other"))
    assert made.trainable == [20]
    assert numbers(made.held_out()) == list(range(12))
    assert numbers(made.held_out(4)) == [0, 3, 6, 9]


def test_sets_that_do_not_belong_together() -> None:
    def refused(match: str, *, train: dict[str, Any] | None = None, **changes: Any) -> None:
        with pytest.raises(UpcycleError, match=match):
            Examples(
                numbered(9, "a", **(train or {})),
                numbered(9, "b", **changes),
                held_out_share=0,
                seed=0,
            )

    refused(r"images \(1, 1, 3\) and b of images \(1, 1, 1\)", channels=1)
    refused("labels up to 5 and a up to 4", num_labels=6)
    train = {"class_names": ("x", "y")}
    refused("name other classes: only one of them has y, z", train=train, class_names=("x", "z"))
    refused("name other classes: their order differs", train=train, class_names=("y", "x"))


def test_too_few_images() -> None:
    with pytest.raises(UpcycleError, match=r"20 images.*held_out = 0.01 leaves none held out"):
        batches(20, 0.01)
    with pytest.raises(UpcycleError, match=r"20 images.*held_out = 0.99 leaves none to train on"):
        batches(20, 0.99)


def test_a_position_among_other_images() -> None:
    state = batches(20).state()
    with pytest.raises(UpcycleError, match="set has 21 images and had 20"):
        batches(21).restore(state)
    other = Examples(numbered(20, labels=np.zeros(20, np.int64)), None, held_out_share=0, seed=0)
    with pytest.raises(UpcycleError, match="other labels"):
        other.restore(state)


def test_other_images_with_the_same_labels(tmp_path: Path) -> None:
    """Pixels are known by their content, and damage is seen."""
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
    options: dict[str, Any] = {"size": (4, 4), "channels": 3, "cache": tmp_path / "cache"}

    def made(shade: int) -> Examples:
        for name in ("a", "b"):
            Image.new("RGB", (4, 4), (shade, 0, 0)).save(tmp_path / "images" / name / "1.png")
        return Examples(ImageSet.open(tmp_path / "images", **options), None, held_out_share=0.0, seed=0)

    first = made(1)
    (pixels,) = (tmp_path / "cache").glob("*.pixels")
    whole = pixels.read_bytes()
    with pytest.raises(
        UpcycleError,
        match=r"other images than it had when .*\(if the run began in an earlier version",
    ):
        made(200).restore(first.state())
    made(1).restore(first.state())
    for path in (tmp_path / "cache").glob("*.pixels"):
        if path.read_bytes() == whole:
            path.write_bytes(b"\1" + whole[1:])
    made(1).restore(first.state())


def test_examples_are_known_by_what_is_in_them(tmp_path: Path) -> None:
    """Copies of the same images are the same, and other images with the same labels are not."""
    found = {}
    for name, shade in (("a", 1), ("copy", 1), ("other", 2)):
        for label in ("x", "y"):
            (tmp_path / name / label).mkdir(parents=True)
            Image.new("RGB", (4, 4), (shade, 0, 0)).save(tmp_path / name / label / "1.png")
        path = tmp_path / name
        found[name] = ImageSet.open(path, size=(4, 4), channels=3, cache=tmp_path / f"cache of {name}")
    (a, _), (copy, _), (other, test) = (
        Examples(found[name], found["a"], held_out_share=0.0, seed=0).known() for name in found
    )
    assert (a[0], a[1]) == (str(tmp_path / "a"), copy[1])
    assert {**other[1], "sha256": a[1]["sha256"]} == a[1] != other[1]
    assert test == a


@pytest.mark.parametrize("lacks", [("sha256",), ("content", "stamp")])
def test_images_of_older_versions_are_made_anew(
    lacks: tuple[str, ...], kept: bool, opened: Open, tmp_path: Path
) -> None:
    """They do not say what they were made from."""
    path = write_folder(tmp_path / "data", [encoded(p, "BMP") for p in PICTURES], LABELS, "bmp")
    digest = opened(path).digest
    (about,) = (tmp_path / "cache").glob("*.json")
    known = json.loads(about.read_text())
    about.write_text(json.dumps({key: value for key, value in known.items() if key not in lacks}))
    assert opened(path).digest == digest
    assert json.loads(about.read_text()) == known


# --- augmentation

OFF: dict[str, Any] = {"flip": 0.0, "mean": (0.0,), "std": (1.0,)}
EVERYTHING: dict[str, Any] = {
    "flip": 0.5,
    "crop_padding": 4,
    "resized_crop": 0.3,
    "rand_augment_layers": 2,
    "mixup": 0.8,
    "cutmix": 1.0,
    "erasing": 0.25,
    "erasing_fill": "noise",
    "label_smoothing": 0.1,
}


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    """Sixteen smooth pictures of 32 x 24 pixels in 0..1."""
    pixels = np.stack([np.asarray(picture(i, (24, 32))) for i in range(16)])
    return Augment().pixels(torch.from_numpy(pixels))


LABEL = torch.arange(16) % 10


def test_pixels_and_normalisation() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    made = Augment(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    pixels = made.pixels(torch.from_numpy(raw))
    np.testing.assert_allclose(pixels, raw.transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    wanted = (raw / 255 - [0.1, 0.2, 0.3]) / [0.5, 1.0, 2.0]
    np.testing.assert_allclose(made.evaluate(pixels), wanted.transpose(0, 3, 1, 2), rtol=1e-4, atol=1e-6)
    grey = Augment().normalized(torch.ones(1, 1, 2, 2))  # equal numbers serve one channel as well
    assert grey.unique().tolist() == [1.0]
    with pytest.raises(UpcycleError, match=r"augment.mean = \[0.1, 0.2, 0.3\] is for 3 channels .* have 1"):
        made.normalized(torch.ones(1, 1, 2, 2))


def test_what_is_off_draws_nothing(batch: torch.Tensor) -> None:
    before = torch.get_rng_state()
    images, targets = Augment(**OFF).train(batch, LABEL, 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, batch)
    assert torch.equal(targets, torch.eye(10)[LABEL])


@pytest.mark.parametrize("name", [*(name for name in EVERYTHING if name != "erasing_fill"), "all"])
def test_the_same_seed_the_same_batch(name: str, batch: torch.Tensor) -> None:
    made = Augment(**(EVERYTHING if name == "all" else {**OFF, name: EVERYTHING[name]}))
    untouched = batch.clone()
    found = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        found.append(made.train(batch, LABEL, 10))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    if name != "label_smoothing":
        assert not torch.equal(found[0][0], found[1][0])
    images, targets = found[0]
    assert (images.shape, targets.shape) == (batch.shape, (16, 10))
    assert images.isfinite().all()
    torch.testing.assert_close(targets.sum(1), torch.ones(16))
    assert torch.equal(batch, untouched)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images(channels: int, batch: torch.Tensor) -> None:
    torch.manual_seed(0)
    images, _ = Augment(**{**EVERYTHING, "rand_augment_layers": 8}).train(batch[:, :channels], LABEL, 10)
    assert images.shape[1] == channels


def test_flips(batch: torch.Tensor) -> None:
    assert torch.equal(Augment(**{**OFF, "flip": 1.0}).train(batch, LABEL, 10)[0], batch.flip(3))
    many = batch.repeat(100, 1, 1, 1)
    found, _ = Augment(**{**OFF, "flip": 0.3}).train(many, LABEL.repeat(100), 10)
    flipped = (found == many.flip(3)).flatten(1).all(1)
    kept = (found == many).flatten(1).all(1)
    assert (flipped ^ kept).all()
    assert abs(flipped.float().mean() - 0.3) < 4 * (0.3 * 0.7 / 1600) ** 0.5


def test_crops_out_of_zeros(batch: torch.Tensor) -> None:
    many = batch.repeat(20, 1, 1, 1)
    found, _ = Augment(**{**OFF, "crop_padding": 2}).train(many, LABEL.repeat(20), 10)
    places = set()
    for image, crop in zip(many, found, strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)))
        matches = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(padded[:, y : y + 32, x : x + 24], crop)
        ]
        assert len(matches) == 1
        places.add(matches[0])
    assert len(places) == 25


def test_resized_crops(batch: torch.Tensor) -> None:
    """On a ramp of coordinates, each crop says which rectangle it is."""
    y, x = torch.meshgrid(torch.arange(60.0) + 0.5, torch.arange(60.0) + 0.5, indexing="ij")
    ramp = torch.stack([y, x, y]).expand(400, -1, -1, -1) / 60
    torch.manual_seed(0)
    found, _ = Augment(**{**OFF, "resized_crop": 0.25}).train(ramp, torch.zeros(400, dtype=torch.long), 1)
    centre = found[:, :2, 20:40, 20:40] * 60
    height = (centre[:, 0, -1, 0] - centre[:, 0, 0, 0]) / 19 * 60
    width = (centre[:, 1, 0, -1] - centre[:, 1, 0, 0]) / 19 * 60
    area, ratio = height * width / 3600, width / height
    assert 0.24 < area.min() < 0.3
    assert 0.9 < area.max() < 1.01
    assert 0.72 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.4


def test_erasing_leaves_the_mean(batch: torch.Tensor) -> None:
    torch.manual_seed(0)
    made = Augment(flip=0.0, erasing=1.0)
    found, _ = made.train(batch, LABEL, 10)
    erased = (found == 0).all(1)
    for image, whole, gone in zip(found, made.evaluate(batch), erased, strict=True):
        rows, columns = gone.any(1).nonzero(), gone.any(0).nonzero()
        assert gone.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert 0.01 < gone.float().mean() < 0.36
        assert torch.equal(image[:, ~gone], whole[:, ~gone])
    many = batch.repeat(100, 1, 1, 1)
    found, _ = Augment(flip=0.0, erasing=0.25).train(many, LABEL.repeat(100), 10)
    share = (found == 0).all(1).flatten(1).any(1).float().mean()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 1600) ** 0.5


def test_erasing_with_noise(batch: torch.Tensor) -> None:
    """mmpretrain's mode rand: pixels N(0, 1) after normalisation, in rectangles of the areas asked for."""
    many = batch.repeat(30, 1, 1, 1)
    made = Augment(flip=0.0, erasing=0.25, erasing_area=(0.2, 0.25), erasing_fill="noise")
    torch.manual_seed(0)
    found, _ = made.train(many, LABEL.repeat(30), 10)
    whole = made.evaluate(many)
    gone = (found != whole).any(1)
    hit = gone.flatten(1).any(1)
    assert abs(hit.float().mean() - 0.25) < 4 * (0.25 * 0.75 / 480) ** 0.5
    area = gone[hit].flatten(1).float().mean(1)
    assert 0.15 < area.min() <= area.max() < 0.3
    noise = found[gone[:, None].expand_as(found)]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_bicubic_crops_and_moves(batch: torch.Tensor) -> None:
    for options in ({"resized_crop": 0.3}, {"rand_augment_layers": 3}):
        found = []
        for interpolation in ("bilinear", "bicubic"):
            torch.manual_seed(0)
            made = Augment(**OFF, **options, interpolation=interpolation)
            found.append(made.train(batch, LABEL, 10)[0])
        assert 0 < (found[0] - found[1]).abs().mean() < 0.05
        assert 0 <= found[1].min() <= found[1].max() <= 1


def provenance(mixing: dict[str, Any], rounds: int = 30) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mixed batches of images that are one-hot in the channels: each pixel says whose it is."""
    images = torch.eye(8)[:, :, None, None].expand(-1, -1, 20, 12).contiguous()
    made = Augment(**OFF, **mixing)
    torch.manual_seed(0)
    return [made.train(images, torch.arange(8), 8) for _ in range(rounds)]


@pytest.mark.parametrize("mixing", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_targets_are_the_shares_of_the_pixels(mixing: dict[str, float]) -> None:
    cut = mixed = 0
    for batch, targets in provenance(mixing):
        torch.testing.assert_close(targets, batch.mean((2, 3)))
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        pure = ((batch == 0) | (batch == 1)).all()
        other = targets - torch.diag(targets.diag())
        if not other.any():
            continue
        cut, mixed = cut + int(pure), mixed + int(not pure)
        if pure:  # one rectangle, the same in every image
            pasted = (batch.diagonal() == 0).any(-1)
            rows, columns = pasted.any(1).nonzero(), pasted.any(0).nonzero()
            assert pasted.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    if len(mixing) == 2:
        assert cut > 5
        assert mixed > 5
    else:
        assert (cut > 20) == ("cutmix" in mixing)
        assert (mixed > 20) == ("mixup" in mixing)


def test_shares_of_mixup_are_beta_distributed() -> None:
    from scipy import stats

    shares = [float(targets.max(0).values.max()) for _, targets in provenance({"mixup": 0.4}, 500)]
    # The largest of a batch is the share itself or one less it; either way folded at a half.
    folded = [max(s, 1 - s) for s in shares if s < 1]
    wanted = stats.beta(0.4, 0.4)
    assert stats.kstest(folded, lambda s: wanted.cdf(s) - wanted.cdf(1 - np.asarray(s))).pvalue > 0.001


def test_smoothed_targets(batch: torch.Tensor) -> None:
    _, targets = Augment(**OFF, label_smoothing=0.2).train(batch, LABEL, 10)
    logits = torch.randn(16, 10)
    wanted = torch.nn.functional.cross_entropy(logits, LABEL, label_smoothing=0.2)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, targets), wanted)


PILLOW: list[Callable[[Image.Image, float], Image.Image]] = [
    lambda image, change: ImageOps.autocontrast(image),
    lambda image, change: ImageOps.equalize(image),
    lambda image, change: ImageOps.posterize(image, 6),
    lambda image, change: ImageOps.solarize(image, 128),
    lambda image, change: ImageEnhance.Brightness(image).enhance(change),
    lambda image, change: ImageEnhance.Contrast(image).enhance(change),
    lambda image, change: ImageEnhance.Sharpness(image).enhance(change),
    lambda image, change: ImageEnhance.Color(image).enhance(change),
    lambda image, change: ImageOps.posterize(image, 2),
    lambda image, change: ImageOps.invert(image),
    lambda image, change: image.point(lambda value: min(255, value + 55) if value < 128 else value),
]


@pytest.mark.parametrize(("number", "name"), enumerate(augmentation._COLOURS))
@pytest.mark.parametrize("change", [0.55, 1.45])  # of magnitude 15
def test_colour_operations_are_those_of_pillow(
    number: int, name: str, change: float, batch: torch.Tensor
) -> None:
    enhance = augmentation._kornia("enhance")
    found = augmentation._COLOURS[name](enhance, batch, torch.full((16,), change), torch.full((16,), 0.5))
    for i, image in enumerate(found):
        wanted = np.asarray(PILLOW[number](picture(i, (24, 32)), change)).transpose(2, 0, 1)
        assert np.abs(image.numpy() * 255 - wanted).max() < 1.6  # Pillow rounds, twice at times


@pytest.mark.parametrize("move", range(augmentation._MOVES))
@pytest.mark.parametrize("operations", ["paper", "increasing"])
def test_moves_are_those_of_pillow(move: int, operations: str, batch: torch.Tensor) -> None:
    """An affine map about the centre, from places in the output to places in the input."""
    level = 0.7
    levels = torch.zeros(16, 5)
    levels[:, move] = level
    angle = np.radians(30 * level) if move == 0 else 0.0
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    if move in (1, 2):
        matrix[move - 1, 2 - move] += 0.3 * level
    shift = np.zeros(2)
    if move in (3, 4):
        shift[move - 3] = {"paper": 150 / 331, "increasing": 0.45}[operations] * level * (24, 32)[move - 3]
    centre = np.array([12, 16])
    offset = centre + shift - matrix @ centre
    data = (*matrix[0], offset[0], *matrix[1], offset[1])
    found = augmentation._moved(batch, levels, augmentation._TRANSLATIONS[operations])
    for i, image in enumerate(found):
        wanted = picture(i, (24, 32)).transform(
            (24, 32), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR
        )
        wanted = np.asarray(wanted).transpose(2, 0, 1)
        inside = (wanted > 0).all(0)
        inside[1:-1, 1:-1] &= inside[2:, 1:-1] & inside[:-2, 1:-1] & inside[1:-1, 2:] & inside[1:-1, :-2]
        inside[[0, -1]] = inside[:, [0, -1]] = False
        assert inside.mean() > 0.3
        assert np.abs(image.numpy() * 255 - wanted)[:, inside].max() < 1.6


def test_every_image_draws_its_own_operation(batch: torch.Tensor) -> None:
    same = batch[:1].repeat(2000, 1, 1, 1)
    torch.manual_seed(0)
    found = augmentation._RandAugment("paper", 0.5).layer(same)
    kinds = found.flatten(1).unique(dim=0, return_counts=True)[1]
    # None, 4 without a sign and 9 with two; equal shares of 14.
    assert len(kinds) == 5 + 18
    kept = (found == same).flatten(1).all(1).float().mean()
    assert abs(kept - 1 / 14) < 4 * (13 / 14 / 14 / 2000) ** 0.5
    # Of timm's fifteen, six have no sign and none is none.
    found = augmentation._RandAugment("increasing", 0.5, probability=0.5).layer(same)
    kinds = found.flatten(1).unique(dim=0, return_counts=True)[1]
    assert len(kinds) == 6 + 18 + 1
    kept = (found == same).flatten(1).all(1).float().mean()
    assert abs(kept - 0.5) < 4 * (0.25 / 2000) ** 0.5


def test_every_image_draws_its_own_magnitude(batch: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """N(27, 1.5^2) cut at 30, as timm draws N(9, 0.5^2) cut at 10."""
    monkeypatch.setattr(augmentation, "_OPERATIONS", {"paper": ("seen",)})
    monkeypatch.setattr(augmentation, "_MOVES", 0)
    seen: list[torch.Tensor] = []

    def look(k: Any, x: torch.Tensor, change: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        assert torch.allclose((change - 1).abs(), 0.9 * strength)
        seen.append(30 * strength)
        return x

    monkeypatch.setattr(augmentation, "_COLOURS", {"seen": look})
    torch.manual_seed(0)
    options = {"rand_augment_layers": 2, "rand_augment_magnitude": 27.0, "rand_augment_std": 1.5}
    Augment(**OFF, **options).train(batch.repeat(500, 1, 1, 1), LABEL.repeat(500), 10)
    assert len(seen) == 2
    for drawn in seen:
        assert drawn.max() == 30
        assert abs((drawn == 30).float().mean() - 0.0228) < 0.01  # beyond two deviations
        assert abs(drawn.median() - 27) < 0.1
        assert abs(drawn.std() - 1.45) < 0.1


def test_magnitude_zero_changes_little(batch: torch.Tensor) -> None:
    made = Augment(**OFF, rand_augment_layers=1, rand_augment_magnitude=0.0)
    torch.manual_seed(0)
    found, _ = made.train(batch.repeat(10, 1, 1, 1), LABEL.repeat(10), 10)
    kept = (found - batch.repeat(10, 1, 1, 1)).abs().flatten(1).max(1).values < 1 / 255 + 1e-4
    assert abs(kept.float().mean() - 12 / 14) < 0.1  # all but autocontrast and equalize
    assert (
        Augment(rand_augment_layers=1, rand_augment_magnitude=30.0)
        .train(batch, LABEL, 10)[0]
        .isfinite()
        .all()
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("flip", 1.5),
        ("flip", float("nan")),
        ("crop_padding", -1),
        ("resized_crop", 2.0),
        ("rand_augment_layers", -1),
        ("rand_augment_magnitude", 31.0),
        ("mixup", -0.1),
        ("cutmix", float("inf")),
        ("erasing", -0.5),
        ("erasing_area", (0.5, 0.2)),
        ("erasing_area", (0.5,)),
        ("rand_augment_std", -1.0),
        ("rand_augment_probability", 1.5),
        ("label_smoothing", 1.0),
        ("std", (1.0, 0.0, 1.0)),
    ],
)
def test_values_that_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UpcycleError, match=rf"augment\.{key} = "):
        Augment(**{key: value})


def test_read_from_a_table() -> None:
    table = {"flip": 0, "mixup": 0.2, "mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]}
    read = settings.read(Augment, table, "augment")
    assert read == Augment(flip=0.0, mixup=0.2, mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))
    with pytest.raises(UpcycleError, match=r"augment.flips.*did you mean flip"):
        settings.read(Augment, {"flips": 1.0}, "augment")


def test_kornia_missing(batch: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> Any:
        raise ModuleNotFoundError(name)

    augmentation._erasing.cache_clear()
    monkeypatch.setattr(importlib, "import_module", without)
    for option in ({"rand_augment_layers": 1}, {"erasing": 0.5}, {"resized_crop": 0.125}):
        with pytest.raises(UpcycleError, match=r"pip install 'upcycle\[vision\]'"):
            Augment(**option).train(batch, LABEL, 10)
    Augment(crop_padding=1, mixup=1.0, cutmix=1.0).train(batch, LABEL, 10)


# --- real images


@pytest.fixture(scope="module")
def cifar() -> Path:
    path = SHARED / "real" / "images" / "cifar10-test.parquet"
    if not path.is_file():
        pytest.skip(f"the images of CIFAR-10 are not at {path}")
    return path


@pytest.mark.slow
def test_cifar(cifar: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": (32, 32), "channels": 3, "cache": tmp_path}
    found = ImageSet.open(cifar, **options)
    assert (len(found), found.num_labels, found.bad) == (10_000, 10, ())
    assert found.class_names[:3] == ("airplane", "automobile", "bird")
    assert np.bincount(found.labels).tolist() == [1000] * 10
    rows = pyarrow.parquet.read_table(cifar).to_pylist()
    some = np.arange(0, 10_000, 97)
    wanted = [np.asarray(Image.open(io.BytesIO(rows[i]["image"]["bytes"])).convert("RGB")) for i in some]
    np.testing.assert_array_equal(found.read(some), wanted)
    assert found.labels[some].tolist() == [rows[i]["label"] for i in some]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "CACHE_LIMIT", 0)
        np.testing.assert_array_equal(ImageSet.open(cifar, **options).read(some), wanted)
    made = Examples(found, None, held_out_share=0.1, seed=0)
    assert np.bincount(made.held_out()["labels"], minlength=10).min() > 60  # classes are mixed
    trained = np.concatenate([made.next(1000)["labels"] for _ in range(9)])
    assert len(trained) == 9000 == made.trainable[0]
    np.testing.assert_array_equal(np.bincount(trained) + np.bincount(made.held_out()["labels"]), [1000] * 10)
