"""Recipes: TOML, overrides, round trip, and messages that say what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from upcycle import Recipe, UpcycleError, recipe, settings
from upcycle.recipe import of_run_file, override
from upcycle.training.run import Run

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


def test_a_run_file_as_a_recipe_keeps_what_neither_knows(tmp_path):
    run = {"source": "dense", "out": "o", "data": {}, "train": {}, "schedule": {}, "moe": {"num_experts": 4}}
    assert of_run_file({**run, "stage": [{}], "eval": {}}) == {"moe": {"num_experts": 4}}
    assert of_run_file({**run, "inti": {"name": "drop"}})["inti"] == {"name": "drop"}
    path = tmp_path / "typo.toml"
    path.write_text('source = "dense"\nout = "o"\n[moe]\nnum_experts = 4\n[inti]\nname = "drop"\n')
    for read in (Recipe.of, Recipe.load):
        with pytest.raises(UpcycleError, match=r"unknown key inti.*init"):
            read(path)


def test_the_keys_of_runs_are_those_that_run_files_have_beside_recipes():
    shared = {"recipe", "router", *recipe.OF_ANY_RUN}
    assert set(recipe.OF_RUNS) == {*settings.keys(Run)} - shared


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
        ({"router": {"init": "nromal"}}, "did you mean normal? Known: centroids"),
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
        assert run.schedule.at(0, run.train.total_steps) == pytest.approx(1_000_001**-0.5)
        assert (run.optimizer.name, run.optimizer.start_step) == ("adafactor", 1_000_000)
    else:
        assert built.moe_layers == [2, 3]
        assert run.optimizer.carry_state


def test_the_numbers_of_sparse_upcycling():
    """The presets have those of the paper, for vision and for language."""
    folder = Path(__file__).parents[1] / "recipes"
    given = ["source=a", "out=b"]
    vit = Run.load(folder / "sparse_upcycling_vit.toml", given)
    router = {
        "name": "expert_choice",
        "capacity_factor": 2.0,
        "normalize": True,
        "init": "normal",
        "std": 0.02,
    }
    assert vit.recipe is not None
    assert has(vit.recipe.router, **router, rescale=True, rounding="exact", group=0)
    moe = {"num_experts": 32, "target": "upcycled", "granularity": 1, "shared_experts": 0}
    assert has(vit.recipe.moe, **moe, layers="last_half", pooling="mean")
    assert has(vit.train, batch_size=4096, steps=100_000)
    assert has(vit.optimizer, carry_state=True, weight_decay=0.03)
    assert has(vit.schedule, name="inverse_sqrt", peak=1e-3, warmup=10_000, decay=50_000)
    t5 = Run.load(folder / "sparse_upcycling_t5.toml", given)
    assert t5.recipe is not None
    assert has(t5.recipe.moe, **moe, layers="every_other", top_k=2)
    encoder, decoder = (t5.recipe.at(stack).router for stack in ("encoder", "decoder"))
    raw = {"normalize": False, "rescale": False, "std": 0.02}
    assert has(encoder, **{**router, **raw}, rounding="exact")
    assert has(decoder, **raw, name="top_k", capacity_factor=2.0, rounding="flaxformer", batch_priority=False)
    assert has(decoder, noise_std=0.0)
    assert has(t5.router, balance_loss="per_layer", balance_loss_coef=0.01, layers="mean", z_loss_coef=0.0)
    assert has(t5.router, importance_loss_coef=0.0, load_loss_coef=0.0, jitter=0.0)
    assert has(t5.train, batch_size=128, sequence_length=512, steps=500_000, clip_grad_norm=0.0, dropout=0.0)
    assert has(t5.schedule, name="inverse_sqrt", peak=1e-2, warmup=10_000, start_step=1_000_000)


def has(table, **wanted):
    """Whether a table has these values; whoever fails sees which differ."""
    assert {key: getattr(table, key) for key in wanted} == wanted
    return True


def test_not_toml(tmp_path):
    (tmp_path / "x.toml").write_text("a = = 1")
    with pytest.raises(UpcycleError, match="is not TOML"):
        Recipe.load(tmp_path / "x.toml")
    with pytest.raises(UpcycleError, match="is a folder"):
        Recipe.load(tmp_path)


def test_the_order_of_settings_does_not_matter():
    for given in (["init.ratio=0.25", "init.name=drop"], ["init.name=drop", "init.ratio=0.25"]):
        assert Recipe.of(override({}, given)).init.ratio == 0.25


@pytest.mark.parametrize("section", ["init", "router"])
@pytest.mark.parametrize("name", [5, 0.5, True, ["copy"], {"a": 1}])
def test_a_name_that_is_no_text(section, name):
    for table in ({section: {"name": name}}, override({}, [f"{section}.name={str(name).lower()}"])):
        with pytest.raises(UpcycleError, match=r"is no name; give one of|unknown|must be a section"):
            Recipe.of(table)


def test_a_task_that_is_no_text():
    from upcycle.training.run import Run

    with pytest.raises(UpcycleError, match=r"is no name|allowed:"):
        Run.of({"source": "a", "task": {"name": 5}})


@pytest.mark.parametrize("depth", [20, 300, 990, 5_000, 100_000])
def test_deep_nesting(depth, tmp_path):
    lists, tables = "[" * depth + "]" * depth, "{a = " * depth + "1" + "}" * depth
    for value in (lists, tables):
        for key in ("seed", "moe", "init.name", "moe.layers"):
            with pytest.raises(UpcycleError):
                Recipe.of(override({}, [f"{key}={value}"]))
            (tmp_path / "r.toml").write_text(f"{key} = {value}")
            with pytest.raises(UpcycleError, match=r"is not TOML|is no name"):
                Recipe.load(tmp_path / "r.toml")
    with pytest.raises(UpcycleError, match="expected KEY=VALUE"):
        override({}, [".".join(["a"] * depth) + "=1"])
    (tmp_path / "r.toml").write_text(".".join(["a"] * depth) + " = 1")
    with pytest.raises(UpcycleError):
        Recipe.load(tmp_path / "r.toml")


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 5000, "-0x" + "f" * 5000, str(10**400)])
def test_whole_numbers_without_end(number, tmp_path):
    for key in ("seed", "router.std", "moe.num_experts", "init.name", "moe.layers", "moe.pooling"):
        with pytest.raises(UpcycleError) as error:
            Recipe.of(override({}, [f"{key}={number}"]))
        assert len(str(error.value)) < 400
        (tmp_path / "r.toml").write_text(f"{key} = {number}")
        with pytest.raises(UpcycleError):
            Recipe.load(tmp_path / "r.toml")


def test_nul_characters(tmp_path):
    with pytest.raises(UpcycleError, match="NUL"):
        Recipe.load("a\0b")
    (tmp_path / "r.toml").write_text('base = "a\\u0000b"')
    with pytest.raises(UpcycleError, match="NUL"):
        Recipe.load(tmp_path / "r.toml")
    with pytest.raises(UpcycleError, match="NUL"):
        Recipe.of(override({}, ['moe.target="a\\u0000b"']))


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert Recipe.load(tmp_path / "r.toml").seed == 3
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UpcycleError, match="not UTF-8"):
        Recipe.load(tmp_path / "r.toml")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("num_experts", "did you mean moe.num_experts? Known: base, decoder, drop, dtype, grow, init, moe, "
                        "router, seed, stage_1, stage_2, stage_3, stage_4, successor"),
        ("std", "did you mean router.std?"),
        ("hidden_size", "did you mean successor.hidden_size?"),
        ("parts", "unknown key parts"),
    ],
)  # fmt: skip
def test_unknown_keys_are_told_where_they_belong(key, said):
    with pytest.raises(UpcycleError) as error:
        Recipe.of({key: 1})
    assert said in str(error.value)
    assert ", parts" not in str(error.value)


def test_unknown_keys_of_a_run_file():
    from upcycle.training.run import Run

    for key, said in (("num_experts", "moe.num_experts"), ("batch_size", "train.batch_size"), ("mo", "moe?")):
        with pytest.raises(UpcycleError) as error:
            Run.of({"source": "a", key: 1})
        assert f"did you mean {said}" in str(error.value)
        for known in ("base", "moe", "init", "successor", "task", "router"):
            assert f"{known}," in str(error.value)


def test_the_experts_of_a_base_can_be_taken_away(tmp_path):
    from upcycle.training.run import Run

    (tmp_path / "base.toml").write_text(
        'source = "a"\nout = "b"\ndtype = "bfloat16"\ntrain.steps = 1\ndata.sources = [{path = "t.txt"}]\n'
        'schedule = {name = "constant", peak = 1e-3}\nmoe.num_experts = 4\ninit.name = "drop"\n'
        "router = {std = 0.1, z_loss_coef = 0.5}\ndrop = ['v_head.*']\n"
    )
    (tmp_path / "dense.toml").write_text('base = "base.toml"\nmoe = false\n')
    dense = Run.load(tmp_path / "dense.toml")
    assert dense.recipe is None
    assert dense.router.z_loss_coef == 0.5
    whole = Run.load(tmp_path / "base.toml")
    assert whole.recipe is not None
    assert dense.drop == whole.drop == whole.recipe.drop == ("v_head.*",)
    assert Run.of(whole.as_table()) == whole
    assert Run.of(dense.as_table()) == dense
    assert Run.load(tmp_path / "base.toml", ["moe=false"]) == dense
    assert Run.load(tmp_path / "base.toml", ["train.steps=1", "moe=false"]) == dense
    (tmp_path / "dense.toml").write_text('base = "base.toml"\nmoe = false\ninit.name = "copy"\n')
    with pytest.raises(UpcycleError, match="init is for a Mixture of Experts"):
        Run.load(tmp_path / "dense.toml")
    (tmp_path / "grown.toml").write_text('base = "base.toml"\nmoe = false\ngrow.factor = 2\n')
    grown = Run.load(tmp_path / "grown.toml").recipe
    assert grown is not None
    assert grown.grow is not None
    assert grown.init.name == "copy"
    with pytest.raises(UpcycleError, match="a recipe is of experts"):
        Recipe.of({"moe": False})


@pytest.mark.parametrize("place", ["router", "decoder.router"])
def test_a_key_can_be_set_below_a_name(place):
    """`init = "normal"` is short for a table with that name."""
    key, wanted = f"{place}.init", {"name": "prompts", "statistics": "a.safetensors"}
    given = [f"{key}.statistics=a.safetensors", f"{key}.name=prompts"]
    *sections, last = key.split(".")
    for given_so in (given, given[:0:-1] + given[:1], [f"{key}=prompts", given[0]]):
        table: dict = {last: "normal"}
        for section in reversed(sections):
            table = {section: table}
        found = override(table, given_so)
        for section in sections:
            found = found[section]
        assert found[last] == wanted
    with pytest.raises(UpcycleError, match="source is a single value, not a section"):
        override({"source": "a"}, ["source.name=b"])


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"moe": {"num_experts": 65536}}, "makes 262,144 experts in all layers together"),
        ({"moe": {"num_experts": 16385}}, "makes 65,540 experts in all layers together"),
        (
            {"moe": {"num_experts": 10**12, "top_k": 1, "target": "upcycled"}},
            "experts in all layers together",
        ),
        ({"moe": {"target": "depth_tiled", "depth": 100_000}}, "400,000 blocks of 4"),
    ],
)
def test_enormous_numbers_are_refused_before_anything_is_built(table, said, dense):
    from upcycle import blueprint

    with pytest.raises(UpcycleError) as error:
        blueprint(dense("llama"), Recipe.of(table))
    assert said in str(error.value)


def test_enormous_batches():
    from upcycle.training.run import Train

    for wrong in ({"batch_tokens": 1024 * 10**9}, {"batch_size": 10**12}):
        with pytest.raises(UpcycleError, match="a global batch has"):
            Train(steps=1, **wrong)
