"""Recipes: TOML, overrides, round trip, and messages that say what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from upcycle import Recipe, UpcycleError
from upcycle.recipe import of_run_file, override

FULL = """
seed  = 3
dtype = "bfloat16"
[moe]
num_experts = 4
top_k = 1
layers = [1, 3]
target = "granitemoe"
granularity = 1
shared_experts = 0
[init]
name = "drop"
ratio = 0.25
indices = "independent"
[router]
init = "uniform"
std = 1
normalize = true
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(FULL)
    return path


def test_defaults():
    recipe = Recipe.of()
    assert (recipe.seed, recipe.dtype, recipe.init.name) == (0, "source", "copy")
    assert (recipe.moe.num_experts, recipe.moe.top_k, recipe.moe.layers) == (8, 2, "all")
    assert (recipe.router.init, recipe.router.std) == ("normal", 0.02)


def test_toml(recipe_file):
    recipe = Recipe.load(recipe_file)
    assert recipe.moe.layers == (1, 3)
    assert (recipe.init.name, recipe.init.ratio, recipe.init.indices) == ("drop", 0.25, "independent")
    assert recipe.router.std == 1.0
    assert Recipe.of(recipe.as_table()) == recipe


def test_overrides(recipe_file):
    recipe = Recipe.load(recipe_file, ["moe.layers=all", "init.ratio=0.5", "dtype=float32", "moe.top_k = 2"])
    assert (recipe.moe.layers, recipe.init.ratio, recipe.dtype, recipe.moe.top_k) == (
        "all",
        0.5,
        "float32",
        2,
    )


def test_another_init_takes_its_own_keys_only(recipe_file):
    assert Recipe.load(recipe_file, ["init.name=copy"]).init.name == "copy"
    assert Recipe.load(recipe_file, ["init.name=drop"]).init.ratio == 0.25
    assert Recipe.load(recipe_file, ["init.name=noise", "init.sigma=0.5"]).init.sigma == 0.5


def test_another_router_takes_its_own_keys_only():
    preset = {
        "source": "a",
        "router": {
            "name": "expert_choice", "capacity_factor": 2.0, "rounding": "vmoe", "group": 8, "std": 0.5,
            "balance_loss_coef": 0.1,
        },
        "decoder": {"router": {"name": "top_k", "noise_std": 1.0, "normalize": False}},
    }  # fmt: skip
    changed = override(preset, ["router.slots=4", "router.name=soft"])
    assert changed["router"] == {"name": "soft", "slots": 4, "std": 0.5, "balance_loss_coef": 0.1}
    assert changed["decoder"] == preset["decoder"]
    assert Recipe.of(of_run_file(changed)).router.slots == 4
    changed = override(preset, ["decoder.router.name=sigmoid"])
    assert changed["decoder"]["router"] == {"name": "sigmoid", "normalize": False}
    assert override(preset, ["router.name=expert_choice"]) == preset
    inherits = {"router": {"name": "sigmoid"}, "decoder": {"router": {"std": 0.1}}}
    assert override(inherits, ["decoder.router.name=sigmoid"])["decoder"]["router"]["std"] == 0.1
    assert Recipe.of(override({}, ["router.name=soft"])).router.name == "soft"


def test_override_leaves_its_argument_alone():
    table = {"moe": {"top_k": 1}}
    override(table, ["moe.top_k=2"])
    assert table == {"moe": {"top_k": 1}}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"moe": {"top_k": "2"}}, "moe.top_k = '2'; allowed: whole number"),
        ({"moe": {"top_k": True}}, "moe.top_k = True"),
        ({"moe": {"layers": [1.5]}}, "a list of whole numbers"),
        ({"moe": 3}, "must be a section"),
        ({"seed": 1.5}, "seed = 1.5"),
        ({"router": {"std": "big"}}, "allowed: a number"),
        ({"router": {"std": float("nan")}}, "router.std"),
        ({"router": {"init": "nromal"}}, "allowed: normal, uniform, zeros, orthogonal, grouped"),
        ({"init": {"name": "drop", "indices": "both"}}, "allowed: shared, independent"),
        ({"init": {"name": "noise", "relative": 1}}, "true or false"),
        ({"init": {"name": "noise", "sigma": -1}}, "init.sigma"),
        ({"init": {"name": "branch_train_mix", "sources": "a"}}, "a list of strings"),
        ({"init": {"name": "branch_train_mix", "sources": []}}, "at least one more"),
        ({"experts": 3}, "unknown key experts"),
    ],
)
def test_mistakes(table, message):
    with pytest.raises(UpcycleError) as error:
        Recipe.of(table)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "path",  # that of MoE Jetpack is tested in test_spherical.py
    sorted((Path(__file__).parents[1] / "recipes").glob("[!m]*.toml")),
    ids=lambda p: p.stem,
)
def test_the_recipes_that_are_shipped(path, dense, tmp_path):
    """Each fits a model of its kind; a run file is a recipe as well, and a whole run."""
    from upcycle import blueprint
    from upcycle.training.run import Run

    kinds = {
        "sparse_upcycling_vit": (
            "ViTForImageClassification",
            {"patch_size": 1},
        ),  # enough tokens for 32 experts
        "sparse_upcycling_t5": ("T5ForConditionalGeneration", {"num_decoder_layers": 4}),
    }
    if path.stem not in kinds:
        blueprint(dense("qwen2"), Recipe.load(path))
        return
    architecture, changes = kinds[path.stem]
    source = tiny.make(tmp_path / "dense", architecture, **changes)
    built = blueprint(source, Recipe.load(path))
    run = Run.load(path, [f"source={source}", f"out={tmp_path}"])
    assert run.recipe == built.recipe
    assert {site.num_experts for site in built.sites} == {32}
    if "t5" in path.stem:
        routers = [built.recipe.at(stack).router for stack in ("encoder", "decoder")]
        assert [r.name for r in routers] == ["expert_choice", "top_k"]
        assert not any(r.normalize or r.rescale for r in routers)
        assert built.moe_layers == {"encoder": [1, 3], "decoder": [1, 3]}
        assert run.schedule.at(0, run.train.total_steps) == pytest.approx(1e-3 * (10_000 / 1_000_001) ** 0.5)
    else:
        assert built.moe_layers == [2, 3]
        assert run.optimizer.carry_state


def test_not_toml(tmp_path):
    (tmp_path / "x.toml").write_text("a = = 1")
    with pytest.raises(UpcycleError, match="is not TOML"):
        Recipe.load(tmp_path / "x.toml")
    with pytest.raises(UpcycleError, match="is a folder"):
        Recipe.load(tmp_path)


def test_the_order_of_settings_does_not_matter():
    for settings in (["init.ratio=0.25", "init.name=drop"], ["init.name=drop", "init.ratio=0.25"]):
        assert Recipe.of(override({}, settings)).init.ratio == 0.25
