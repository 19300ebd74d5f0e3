"""The recipes of MoE Jetpack: the paper's numbers, and a run of a few steps on images of the right shapes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny
from upcycle.errors import UpcycleError
from upcycle.recipe import read_toml
from upcycle.training.loop import train
from upcycle.training.run import Run

RECIPES = Path(__file__).parents[2] / "recipes"
SETS = {  # images, classes, epochs of warm-up and in all, drop path: table 7, and the sets' own sizes
    "cifar10": (50_000, 10, 50, 300, 0.1),
    "cifar100": (50_000, 100, 50, 300, 0.1),
    "pets": (3_680, 37, 100, 600, 0.1),
    "flowers": (2_040, 102, 100, 600, 0.1),
    "stl10": (5_000, 10, 50, 300, 0.0),
    "food101": (75_750, 101, 50, 300, 0.1),
    "dtd": (3_760, 47, 100, 600, 0.2),
}
DRY = ["vit", "vit_repo", "vit_dtd"]  # the other sets differ in numbers alone


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A ViT of 12 narrow blocks on 224 x 224 pixels, one half as wide, statistics, and a few images."""
    folder = tmp_path_factory.mktemp("jetpack")
    for name, hidden in (("large", 32), ("small", 16)):
        tiny.make(
            folder / name, "ViTForImageClassification", hidden_size=hidden, intermediate_size=4 * hidden,
            num_hidden_layers=12, num_attention_heads=hidden // 8, image_size=224, patch_size=16,
        )  # fmt: skip
    tiny.make_statistics(folder / "found.safetensors", folder / "large")
    return folder


def images(folder: Path, classes: int) -> Path:
    """One image a class, of sizes as they come."""
    random = np.random.default_rng(0)
    for i in range(classes):
        (folder / f"{i:04}").mkdir(parents=True)
        pixels = random.integers(0, 256, (240 + i % 9, 300, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04}" / "0.jpg")
    return folder


def settings(made: Path, name: str) -> dict:
    table = read_toml(RECIPES / f"moe_jetpack_{name}.toml")
    table |= {"source": str(made / "large")}
    table["init"]["statistics"] = str(made / "found.safetensors")
    table["successor"]["hidden_size"] = 16
    table["moe"]["universal_width"] = 16
    if "rest" in table["successor"]:
        table["successor"]["rest"] = str(made / "small")
    return table


@pytest.mark.slow
@pytest.mark.parametrize("name", DRY)
def test_a_dry_run(name, made, tmp_path):
    """Two steps, 98 core and 196 universal experts in the last six of twelve blocks, all augmentation on."""
    table = settings(made, name)
    classes = table["task"]["classes"]
    table["task"]["classes"] = min(classes, 12)
    folder, test = (images(tmp_path / name, min(classes, 12)) for name in ("images", "test"))
    table |= {"out": str(tmp_path / "run"), "data": {"sources": [{"path": str(folder)}]}}
    table["task"]["test"] = str(test)
    del table["train"]["examples"]
    table["train"] |= {"steps": 2, "batch_size": 3, "eval_examples": 2, "precision": "float32"}
    table["schedule"]["warmup"] = 1
    result = train(Run.of(table))
    assert result.finished
    assert math.isfinite(result.loss)
    assert math.isfinite(result.held_out_loss)


@pytest.mark.parametrize("name", SETS)
def test_settings_of_the_downstream_sets(name):
    count, classes, warm, epochs, drop_path = SETS[name]
    run = Run.of(read_toml(RECIPES / f"moe_jetpack_vit_{name}.toml"))
    assert run.task.classes == classes
    assert run.train.batch_size == 512
    assert run.train.examples == epochs * count
    assert run.schedule.warmup == math.ceil(warm * count / 512)
    assert run.train.drop_path == drop_path
    paper = Run.of(read_toml(RECIPES / "moe_jetpack_vit.toml"))
    assert run.recipe == paper.recipe
    assert run.task.augment == paper.task.augment


def test_the_repository_s_settings():
    run = Run.of(read_toml(RECIPES / "moe_jetpack_vit_repo.toml"))
    paper = Run.of(read_toml(RECIPES / "moe_jetpack_vit.toml"))
    router, init = run.recipe.router, run.recipe.init
    assert (router.combine, router.keys, router.temperatures, router.noise_in_eval) == (
        "entmax15", "plain", 2, True,
    )  # fmt: skip
    assert (init.channels, init.universal) == ("per_expert", "thinned")
    assert run.train.layer_decay == 0.6
    assert run.train.total_steps == paper.train.total_steps
    assert run.schedule.floor == pytest.approx(run.schedule.peak / 100)
    assert run.schedule.warmup == math.ceil(20 * 1_281_167 / 4096)


# --- a file that goes over another


def test_a_base(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.toml").write_text("a = 1\nb = [1, 2]\n[t]\nx = 1\n[t.u]\ny = 1\nz = 2\n")
    (tmp_path / "sub" / "over.toml").write_text('base = "../base.toml"\nb = [3]\n[t]\nw = 5\n[t.u]\ny = 9\n')
    (tmp_path / "sub" / "top.toml").write_text('base = "over.toml"\na = 2\n[t.u]\nz = 7\n')
    assert read_toml(tmp_path / "sub" / "over.toml") == {
        "a": 1, "b": [3], "t": {"x": 1, "w": 5, "u": {"y": 9, "z": 2}},
    }  # fmt: skip
    assert read_toml(tmp_path / "sub" / "top.toml") == {
        "a": 2, "b": [3], "t": {"x": 1, "w": 5, "u": {"y": 9, "z": 7}},
    }  # fmt: skip


def test_a_base_with_another_router_and_initialisation(tmp_path):
    """What belonged to the old names goes, as it does with --set; what every router has stays."""
    (tmp_path / "base.toml").write_text(
        '[init]\nname = "drop"\nratio = 0.5\n[router]\nname = "spherical"\nexpert_dropout = 0.1\nstd = 0.5\n'
    )
    over = tmp_path / "over.toml"
    over.write_text('base = "base.toml"\n[init]\nname = "copy"\n[router]\nname = "top_k"\n')
    assert read_toml(over) == {"init": {"name": "copy"}, "router": {"name": "top_k", "std": 0.5}}
    over.write_text('base = "base.toml"\n[init]\nratio = 0.1\n[router]\nname = "spherical"\n')
    assert read_toml(over)["init"] == {"name": "drop", "ratio": 0.1}
    assert read_toml(over)["router"]["expert_dropout"] == 0.1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('base = "nowhere.toml"', r"no recipe \(the base of over\.toml\) at"),
        ("base = 3", "must be the name of a TOML file"),
        ('base = "over.toml"', "which is based on it"),
        ('base = "."', "is a folder"),
    ],
)
def test_a_base_that_is_none(text, said, tmp_path):
    (tmp_path / "over.toml").write_text(text)
    with pytest.raises(UpcycleError, match=said):
        read_toml(tmp_path / "over.toml")
