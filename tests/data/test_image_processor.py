"""Images are resized, cut and normalised as the image processors of transformers do it with Pillow."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from upcycle.data import images
from upcycle.data.augment import Augment
from upcycle.data.image_processor import KINDS, OF_MODELS, ImageProcessor
from upcycle.data.images import Form, ImageSet, decoded
from upcycle.data.preparation import Covered, Processed
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.tasks.image_classification import ImageClassification, _processor

# What the file says, the type of the model, and the size of its images.
CASES: dict[str, tuple[dict[str, Any], str, int]] = {
    "vit": ({"size": {"height": 32, "width": 32}}, "vit", 32),
    "vit, as first released": (
        {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "size": 24}, "vit", 24
    ),
    "vit, bicubic": ({"feature_extractor_type": "ViTFeatureExtractor", "size": 24, "resample": 3}, "vit", 24),
    "vit, not normalised": ({"size": 24, "do_normalize": False}, "vit", 24),
    "vit, in -1..1": ({"size": 24, "rescale_factor": 2 / 255, "image_mean": [1] * 3, "image_std": [1] * 3},
                      "vit", 24),
    "vit, not rescaled": ({"size": 24, "do_rescale": False, "image_mean": 127.5, "image_std": [50] * 3},
                          "vit", 24),
    "deit": ({"size": 64, "crop_size": 32}, "deit", 32),
    "deit, odd": ({"size": {"height": 41, "width": 37}, "crop_size": 32}, "deit", 32),
    "deit, not cut": ({"size": 32, "do_center_crop": False}, "deit", 32),
    "deit, smaller than the crop": ({"size": 27, "crop_size": 32}, "deit", 32),
    "deit, not resized": ({"do_resize": False, "crop_size": 33}, "deit", 33),
    "dinov2": ({"image_processor_type": "BitImageProcessor", "crop_size": {"height": 32, "width": 32},
                "size": {"shortest_edge": 41}, "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225]}, "dinov2", 32),
    "dinov2, a number": ({"size": 41, "crop_size": 32}, "dinov2", 32),
    "clip": ({"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 32},
              "crop_size": 32}, "clip", 32),
    "siglip": ({"size": {"height": 24, "width": 24}}, "siglip", 24),
    "convnext": ({"size": {"shortest_edge": 32}}, "convnext", 32),
    "convnext, a number": ({"size": 33, "crop_pct": 0.7}, "convnextv2", 33),
    "convnext, large": ({"size": {"shortest_edge": 384}}, "convnext", 384),
}  # fmt: skip
SHAPES = [(50, 30), (30, 50), (37, 37), (20, 61), (24, 24)]


def picture(size: tuple[int, int]) -> Image.Image:
    rough = np.random.default_rng(0).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BILINEAR)


def encoded(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def theirs(folder: Path) -> Any:
    return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    said, model_type, size = CASES[case]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    processor = ImageProcessor(said=said, model_type=model_type)
    assert processor.warning((size, size)) is None
    augment = Augment(mean=processor.mean, std=processor.std)
    form = Form(preparation=processor.preparation((size, size)), channels=3)
    for shape in SHAPES:
        image = picture(shape)
        pixels = decoded(encoded(image), form)
        assert pixels is not None
        found = augment.evaluate(augment.pixels(torch.from_numpy(pixels.copy())[None]))
        wanted = theirs(tmp_path)(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "DINOv3ViT"])  # it needs torchvision
def test_the_defaults_are_those_of_transformers(name: str) -> None:
    kind, theirs = KINDS[name], getattr(transformers, f"{name}ImageProcessorPil")
    assert (kind.size, kind.crop_size) == (theirs.size, getattr(theirs, "crop_size", None))
    assert (kind.resample, list(kind.mean), list(kind.std)) == (
        theirs.resample,
        theirs.image_mean,
        theirs.image_std,
    )
    assert kind.square == theirs.default_to_square
    assert bool(getattr(theirs, "do_center_crop", False)) == (kind.crop_size is not None)
    assert (theirs.do_resize, theirs.do_rescale, theirs.do_normalize) == (True, True, True)
    assert kind.crop_share == getattr(theirs, "crop_pct", None)


@pytest.mark.parametrize("model_type", ["vit", "deit", "dinov2", "clip", "siglip", "convnext", "convnextv2"])
def test_a_file_without_a_type_is_of_the_model_s_type(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"do_resize": true}')
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert type(theirs(tmp_path)).__name__ == f"{OF_MODELS[model_type]}ImageProcessorPil"


def test_without_a_file_images_cover_the_size() -> None:
    processor = ImageProcessor(said={}, model_type="vit")
    assert processor.preparation((8, 12)) == Covered((8, 12))
    assert (processor.mean, processor.std, processor.warning((8, 8))) == ((), (), None)


@pytest.mark.parametrize(
    ("said", "model_type", "asked", "keys"),
    [
        ({"size": 48}, "vit", {"size": 32}, "size = 48 cannot"),
        (
            {"size": {"shortest_edge": 82}, "crop_size": 64},
            "dinov2",
            {"size": {"shortest_edge": 41}, "crop_size": 32},
            "size = {'shortest_edge': 82}, crop_size = 64 cannot",
        ),
        ({"size": 64}, "convnext", {"size": 32}, "size = 64 cannot"),
        ({"size": 32, "do_pad": True}, "vit", {"size": 32}, "do_pad = True cannot"),
        ({"do_normalize": True}, "deit", {"size": 37, "crop_size": 32}, None),  # 256 x 32 / 224
    ],
)
def test_images_have_the_size_of_the_model(said, model_type, asked, keys) -> None:
    """Whatever the file says of it, in its proportions; each key that it cannot follow is named."""
    processor = ImageProcessor(said=said, model_type=model_type, place="here")
    wanted = ImageProcessor(said=asked, model_type=model_type).preparation((32, 32))
    assert processor.preparation((32, 32)) == wanted
    warning = processor.warning((32, 32))
    assert (warning is None) == (keys is None)
    assert keys is None or warning.startswith(f"here: {keys} be followed: the model takes images of 32 x 32")


@pytest.mark.parametrize(
    "said",
    [
        {"size": {"longest_edge": 40}},
        {"size": {"shortest_edge": 40}, "do_center_crop": False, "image_processor_type": "BitImageProcessor"},
        {"do_resize": False},
        {"image_processor_type": "EfficientNetImageProcessor", "size": {"height": 40, "width": 40}},
    ],
)
def test_a_rule_that_is_not_known_is_named(said: dict[str, Any]) -> None:
    processor = ImageProcessor(said=said, model_type="vit")
    preparation = processor.preparation((32, 32))
    assert isinstance(preparation, Covered)
    assert preparation.size == (32, 32)
    warning = processor.warning((32, 32))
    assert warning is not None
    assert all(key in warning for key in said if key != "image_processor_type")
    assert "are not followed: images are resized so that they cover 32 x 32 pixels" in warning


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": -3}, "size = -3; it must be of whole numbers of 1 or more"),
        ({"size": "large"}, "size = 'large'; it must be a number, or a table"),
        ({"size": {"height": 1.5, "width": 2}}, "of whole numbers"),
        ({"resample": 9}, "resample = 9; it must be the number of a filter"),
        ({"do_resize": "no"}, "do_resize = 'no'; it must be true or false"),
        ({"rescale_factor": 0}, "rescale_factor = 0; it must be a number above 0"),
        ({"image_mean": ["a"]}, r"image_mean = \['a'\]; it must be a list of numbers"),
        ({"image_std": [0.0]}, r"image_std = \[0.0\]; it must be of numbers above 0"),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"height": 9, "width": 9}},
            "shortest_edge",
        ),
    ],
)
def test_values_that_are_refused(said: dict[str, Any], message: str) -> None:
    processor = ImageProcessor(said=said, model_type="vit", place="here")
    with pytest.raises(UpcycleError, match=message):
        _ = processor.mean, processor.std, processor.preparation((8, 8))


def test_images_of_another_preparation_are_made_anew(tmp_path: Path) -> None:
    """A white square on black: cut at the centre it is all white, and otherwise a quarter of the image."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[16:48, 16:48] = 255
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "0.png").write_bytes(encoded(Image.fromarray(image)))
    for said, share in (({}, 0.25), ({"size": 64, "crop_size": 32}, 1.0), ({}, 0.25)):
        processor = ImageProcessor(said=said, model_type="deit")
        found = ImageSet.open(
            tmp_path / "data", size=(32, 32), channels=3, processor=processor, cache=tmp_path / "cache"
        )
        white = found.read(np.arange(1)).mean() / 255
        assert white == pytest.approx(share, abs=0.01)
    assert len(list((tmp_path / "cache").glob("*.pixels"))) == 2


NESTED: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4] * 3,
    "crop_size": {"height": 8, "width": 8},
    "size": {"shortest_edge": 9},
}
VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
ALONE = {**NESTED, "image_mean": [0.5, 0.6, 0.7], "size": {"shortest_edge": 11}}


@pytest.mark.parametrize(
    ("processor", "preprocessor"),
    [
        ({"image_processor": NESTED}, None),
        ({"image_processor": NESTED}, ALONE),
        ({"image_processor": None, "processor_class": "CLIPProcessor"}, ALONE),
        ({"processor_class": "CLIPProcessor"}, ALONE),
        (None, ALONE),
    ],
)
def test_the_file_of_all_processors_goes_before_that_of_images(
    processor, preprocessor, tmp_path: Path
) -> None:
    """transformers 5 saves a processor of images and texts in one file, and reads that first."""
    for name, said in (("processor_config", processor), ("preprocessor_config", preprocessor)):
        if said is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(said))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    ours = _processor(Subject(folder=tmp_path, config=VIT))
    assert [*ours.mean] == [*theirs.image_mean]
    assert ours.preparation((8, 8)).resize == theirs.size["shortest_edge"]  # type: ignore[union-attr]
    nested = bool(processor and processor.get("image_processor"))
    assert ours.place == str(
        tmp_path / ("processor_config.json (image_processor)" if nested else "preprocessor_config.json")
    )


def test_what_transformers_saves_with_a_tokenizer_is_read(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    transformers.CLIPProcessor(
        image_processor=transformers.CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3], size=9, crop_size=8),
        tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"),
    ).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    ours = _processor(Subject(folder=tmp_path, config=VIT))
    assert ours.mean == (0.1, 0.2, 0.3)
    assert ours.preparation((8, 8)) == Processed(resize=9, crop=(8, 8), resample=3)


def test_a_part_on_images_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"image_processor": "CLIPImageProcessor"}')
    with pytest.raises(UpcycleError, match="image_processor = 'CLIPImageProcessor'; it must be a table"):
        _ = Subject(folder=tmp_path, config={}).preprocessor


@pytest.mark.usefixtures("on_screen")
def test_a_task_follows_the_file_and_warns_once(tmp_path: Path, capsys) -> None:
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 8,
              "patch_size": 4, "num_channels": 3, "hidden_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 1, "intermediate_size": 16}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 12, "do_normalize": False}))
    image = picture((20, 12))
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "0.png").write_bytes(encoded(image))
    subject, task = Subject(folder=tmp_path, config=config), ImageClassification()
    for _ in range(2):
        found = task.images(str(tmp_path / "data"), subject, tmp_path / "cache", any_classes=True)
    wanted = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(found.read(np.arange(1))[0], wanted)
    batch = {"pixels": torch.from_numpy(found.read(np.arange(1))), "labels": torch.zeros(1).long()}
    pixels = task.question(batch, subject, training=False).inputs["pixel_values"][0]
    assert torch.equal(pixels, torch.from_numpy(wanted).permute(2, 0, 1) / 255)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("size = 12 cannot be followed") == 1


@pytest.mark.parametrize(
    ("said", "new"),
    [
        ({}, False),
        ({"image_mean": [0.5] * 3, "image_std": [0.2] * 3}, False),
        ({"image_mean": [0.5] * 3, "image_std": [0.2] * 3, "rescale_factor": 0.00392156885}, False),
        ({"image_mean": [0.5] * 3, "image_std": [0.2] * 3, "do_normalize": False}, True),
        ({"image_mean": 0.4, "image_std": 0.5}, True),
    ],
)
def test_what_earlier_versions_did_not_read_is_told_apart(said: dict[str, Any], new: bool) -> None:
    assert bool(ImageProcessor(said=said, model_type="vit").news) == new


def test_large_sets_are_known_by_their_preparation_too(tmp_path: Path, monkeypatch) -> None:
    """Their pixels are not kept, and the digest of files is the same however these are prepared."""
    monkeypatch.setattr(images, "CACHE_LIMIT", 0)
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "0.png").write_bytes(encoded(picture((40, 90))))
    warped = ImageProcessor(said={"size": {"height": 32, "width": 32}, "resample": 2}, model_type="vit")
    sets = [
        ImageSet.open(tmp_path / "set", size=(32, 32), channels=3, cache=tmp_path / "cache", **more)
        for more in ({}, {"processor": warped})
    ]
    assert sets[0].digest != sets[1].digest
