"""The tables of every experiment: the code as it is now takes them, and counts what a row costs.

The models are tiny, and nothing is trained.
"""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import scripts
import tiny
from upcycle.recipe import Recipe
from upcycle.reporting.inks import LIGHT

ROOT = Path(__file__).parents[2] / "experiments"
SCRIPTS = [
    "language",
    "vision/jetpack",
    *sorted(str(path.parent.relative_to(ROOT)) for path in ROOT.glob("*/run.py")),
]
VIT = {"image_size": 32, "patch_size": 8, "num_labels": 10}


@pytest.fixture
def script(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The script of an experiment, without what it leaves in Python's tables."""
    with scripts.loaded(request.param) as module:
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of every name that the experiments look for."""
    made = tmp_path_factory.mktemp("experiments")
    tiny.make_dense(made / "checkpoint", "llama", num_hidden_layers=2)
    for name in ("dense", "dense-10"):
        (made / name).symlink_to(made / "checkpoint")
    return made


def of_language(script: ModuleType, folder: Path) -> dict[str, dict[str, Any]]:
    given = Namespace(checkpoint=folder / "checkpoint", texts=folder, base=folder, runs=folder / "runs")
    script.base_curve = lambda _: [[0, 0, 9.0], [800, 10**12, 3.0]]
    for study in script.studies.STUDIES.values():
        assert min(script.steps_of(study, given).values()) > 0
    return {
        f"{name}/{variant}": script.table(changes, 0, 8, given) | {"out": str(folder / name / variant)}
        for name, study in script.studies.STUDIES.items()
        for variant, changes in study.variants.items()
    }


def of_balance(script: ModuleType, folder: Path) -> dict[str, dict[str, Any]]:
    given = Namespace(checkpoint=folder / "checkpoint", text=folder / "text.txt", runs=folder, steps=8)
    return {n: script.table(n, 0, given) for n in script.VARIANTS}


def of_code(script: ModuleType, folder: Path) -> dict[str, dict[str, Any]]:
    script.dense.corpus.write = lambda _: {"held_out": 0.1}
    return {n: script.EXPERIMENT.run_file(folder, 10, n, 0, 8) for n in script.table.VARIANTS}


def of_vision(script: ModuleType, folder: Path) -> dict[str, dict[str, Any]]:
    made = folder / script.__name__
    for size in script.dense.WIDTHS:
        script.dense.model(size).save_pretrained(made / f"{size}-42")
    for name in ("small-154", "selected-42"):
        (made / name).symlink_to(made / "small-42")
    if "jetpack" in script.__name__:
        tiny.make_statistics(made / "large-42.safetensors", made / "large-42")
    return run_files(script.EXPERIMENT, made, 42)


def of_encoder(script: ModuleType, folder: Path) -> dict[str, dict[str, Any]]:
    script.dense.corpus.write = lambda _: {"held_out": 0.1}
    made = folder / "encoder"
    (made / "tokenizer").mkdir(parents=True)
    script.dense.model().save_pretrained(made / "dense-10")
    return run_files(script.EXPERIMENT, made, 10)


def run_files(experiment: Any, folder: Path, start: int) -> dict[str, dict[str, Any]]:
    """The run file of every variant, each with the steps of its budget."""
    made = {}
    for name in experiment.variants:
        steps = experiment.steps_of(folder, start, name)
        assert steps > 0
        made[name] = experiment.run_file(folder, start, name, 0, steps)
    return made


def of_stories(script: ModuleType, folder: Path) -> dict[str, dict[str, Any]]:
    given = Namespace(checkpoint=folder / "checkpoint", text=folder / "text.txt", runs=folder / "runs")
    return {n: script.table(n, 0, 8, given) for n in script.VARIANTS}


def of_distillation(script: ModuleType, folder: Path) -> dict[str, dict[str, Any]]:
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 8, "num_key_value_heads": 4}
    source = tiny.make_dense(folder / "stories", "llama", num_hidden_layers=2, head_dim=8, **sizes)
    given = Namespace(checkpoint=source, text=folder / "text.txt", runs=folder / "runs", steps=8)
    return {n: script.table(n, 0, given) for n in script.VARIANTS}


def of_donors(script: ModuleType, folder: Path) -> dict[str, dict[str, Any]]:
    """The routers start from statistics that are really measured, of a model of bytes."""
    given = Namespace(checkpoint=folder / "donors" / "base", texts=folder, runs=folder / "donors")
    for seed, name in enumerate(("base", *script.DOMAINS)):
        shape = {"num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 256}
        tiny.make_dense(given.runs / name, "llama", seed=seed, **shape)
        tiny.make_bytes_tokenizer(given.runs / name)
    for name, text in script.DOMAINS.items():
        (folder / text).write_text(f"{name} " * 6000)
    script.cut(given)
    tables = {name: script.router_table(name, 0, given) for name in script.VARIANTS}
    return tables | {name: script.donor_table(name, given) for name in script.DOMAINS}


def of_t5(script: ModuleType, folder: Path) -> dict[str, dict[str, Any]]:
    given = Namespace(text=folder / "text.txt", runs=folder / "t5")
    for name in ("t5", "dense-base"):
        tiny.make(given.runs / name, "T5ForConditionalGeneration", vocab_size=512)
    return {str(n): script.table(n, 0, 8, given) for n in (None, *script.VARIANTS)}


def of_vit(script: ModuleType, folder: Path) -> dict[str, dict[str, Any]]:
    given = Namespace(images=folder, runs=folder / "vit")
    tiny.make(given.runs / "dense-base", "ViTForImageClassification", **VIT)
    return {n: script.table(n, 0, 8, given) for n in script.VARIANTS}


def of_jetpack(script: ModuleType, folder: Path) -> dict[str, dict[str, Any]]:
    given = Namespace(images=folder, runs=folder / "jetpack")
    for name, width in (("small", 64), ("small-trained", 64), ("selected", 64), ("large-trained", 128)):
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 32}
        tiny.make(given.runs / name, "ViTForImageClassification", **VIT, **shape)
    tiny.make_statistics(given.runs / "statistics.safetensors", given.runs / "large-trained")
    first, second = script.SETS
    jobs = [*((first, n) for n in script.VARIANTS), (second, "importance_repo")]
    return {f"{data}/{n}": script.table(data, n, 0, given) for data, n in jobs}


TABLES: dict[str, Callable[[ModuleType, Path], dict[str, dict[str, Any]]]] = {
    "balance_counts": of_balance,
    "code": of_code,
    "distillation": of_distillation,
    "donors": of_donors,
    "encoder": of_encoder,
    "language": of_language,
    "moe_jetpack": of_jetpack,
    "sparse_upcycling_t5": of_t5,
    "sparse_upcycling_vit": of_vit,
    "stories260k": of_stories,
    "vision": of_vision,
    "vision/jetpack": of_vision,
}


def test_every_experiment_is_here():
    assert sorted(TABLES) == sorted(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_every_run_of_an_experiment_is_taken_and_counted(script, folder):
    name = script.__name__.removeprefix("experiment_")
    tables = TABLES[name](script, folder)
    cost = sys.modules["common"].flops_per_row
    flops = {variant: cost(table) for variant, table in tables.items()}
    assert len(flops) >= 2
    assert min(flops.values()) > 0


@pytest.mark.parametrize("script", ["language"], indirect=True)
def test_committed_results_are_of_the_variants_in_the_table(script):
    for name, study in script.studies.STUDIES.items():
        runs = json.loads((ROOT / name / "results.json").read_text())["runs"]
        assert {run["variant"]: run["changes"] for run in runs} == study.variants


CONTINUATIONS = ["code", "code/tenth", "encoder", "encoder/narrow", "vision", "vision/jetpack"]


@pytest.mark.parametrize("script", CONTINUATIONS, indirect=True)
def test_the_page_of_an_experiment_has_its_table(script):
    """Rows are those of the committed runs; an experiment that has none says so."""
    outcome = importlib.import_module("outcome").Outcome.of(script.EXPERIMENT)
    page = (script.HERE / "README.md").read_text().splitlines()
    assert {*outcome.table()} <= {*page} if outcome.runs else "**Not run yet.**" in "\n".join(page)


@pytest.mark.parametrize("script", CONTINUATIONS, indirect=True)
def test_questions_are_about_variants(script):
    asked = {name for names in script.EXPERIMENT.questions.values() for name in names}
    assert asked <= {*script.EXPERIMENT.variants}
    assert {*script.EXPERIMENT.core} <= {*script.EXPERIMENT.variants}


@pytest.mark.parametrize("script", CONTINUATIONS, indirect=True)
def test_each_variant_has_a_colour_of_its_own_in_a_figure(script):
    """And in an experiment, what shares a colour has another dash."""
    table = importlib.import_module("places")
    assert len(LIGHT.series) == table.COLOURS
    shown = [script.EXPERIMENT.core, *script.EXPERIMENT.questions.values()]
    for names in shown:
        assert len({table.PLACES[name] % table.COLOURS for name in names}) == len(names)
    every = {name for names in shown for name in names}
    assert len({table.PLACES[name] for name in every}) == len(every)


@pytest.mark.parametrize("script", ["vision/jetpack"], indirect=True)
def test_the_figure_of_jetpack_has_the_smaller_model_that_spent_as_much(script):
    assert "small_of_all_flops" in script.EXPERIMENT.core


@pytest.mark.parametrize("script", ["code/figures"], indirect=True)
def test_seconds_are_those_that_a_benchmark_measured_at_the_size_of_the_model(script):
    """Copies are not in the benchmark."""
    assert script.seconds().keys() == {"dense", "virtual_group", "shuffle_slice"}
    assert 1 < script.seconds()["shuffle_slice"] == script.seconds()["virtual_group"] < 1.3


@pytest.mark.parametrize(
    ("script", "recipe", "variant"),
    [
        ("code", "equal_flops", "shuffle_slice"),
        ("code", "equal_seconds", "shuffle_slice_equal_seconds"),
        ("vision", "equal_flops_vit", "shuffle_slice"),
    ],
    indirect=["script"],
)
def test_a_recipe_of_our_own_runs_is_that_of_the_run(script, recipe, variant):
    changes = script.EXPERIMENT.variants[variant]
    ran = {key: changes[key] for key in ("moe", "init", "router") if key in changes}
    assert Recipe.load(ROOT.parent / "recipes" / f"{recipe}.toml") == Recipe.of(ran)


@pytest.mark.parametrize("script", ["code/tenth"], indirect=True)
def test_a_tenth_of_the_flops_has_a_falling_rate_of_its_own(script, monkeypatch):
    """Its runs take no folder of the longer ones, and their rate falls over the last quarter."""
    monkeypatch.setattr(script.run.dense.corpus, "write", lambda _: {"held_out": 0.1})
    files = [
        each.run_file(Path("f"), 40, "dense", 0, 80) for each in (script.EXPERIMENT, script.run.EXPERIMENT)
    ]
    short, long = files
    assert short["out"] != long["out"]
    assert short["schedule"] == long["schedule"]
    assert short["schedule"]["decay"] == 20
    assert (script.EXPERIMENT.budget("dense"), script.run.EXPERIMENT.budget("dense")) == (0.1, 0.3)


@pytest.mark.parametrize("script", ["code/law"], indirect=True)
def test_the_page_has_the_fitted_law(script):
    assert {*script.table()} <= {*(script.HERE / "README.md").read_text().splitlines()}


@pytest.mark.parametrize("script", ["code/law"], indirect=True)
def test_the_law_of_one_seed_has_no_errors_and_of_one_start_there_is_none(script, monkeypatch):
    whole = script.figures.read()

    def rows(kept: Callable[[dict[str, Any]], bool]) -> list[str]:
        runs = {key: [run for run in each if kept(run)] for key, each in whole.recorded.items()}
        monkeypatch.setattr(script.figures, "read", lambda: type(whole)(whole.experiment, runs))
        return script.table()[2:]

    one_seed = rows(lambda run: run["seed"] == 0)
    assert len(one_seed) > 1
    assert not any("±" in row for row in one_seed)
    assert rows(lambda run: run["start"] == 80) == []


@pytest.mark.parametrize("script", ["encoder"], indirect=True)
def test_a_curve_counts_the_rows_that_the_encoder_reads(script, tmp_path):
    """A row of T5 has the tokens of the decoder too, which `train.batch_tokens` does not count."""
    lines = [
        {"step": 1, "seconds": 2.0, "held_out_start": 7.0, "held_out_accuracy_start": 0.1},
        {"step": 2, "seconds": 3.0, "held_out_loss": 6.0, "held_out_accuracy": 0.2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = {"out": str(tmp_path), "train": {"batch_tokens": 4096, "sequence_length": 128}}
    assert script.EXPERIMENT.curve(run, 10) == [[0, 0, 0, 0.0, 7.0, 0.1], [2, 8192, 640, 5.0, 6.0, 0.2]]
    run["train"] = {"batch_size": 100}
    assert script.EXPERIMENT.curve(run, 10)[-1] == [2, 200, 2000, 5.0, 6.0, 0.2]
