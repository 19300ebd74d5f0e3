"""The functions that people call take what people have: tables, paths as text; or they say what they want."""

from __future__ import annotations

from pathlib import Path

import pytest

import upcycle
from upcycle import Recipe, UpcycleError
from upcycle.calibration.calibration import ToCalibrate
from upcycle.evaluation.specialisation import ToWatch
from upcycle.evaluation.to_score import ToScore
from upcycle.training.run import Run

RUN = {"source": "a", "out": "b", "data": {"sources": [{"path": "t.txt"}]}, "train": {"steps": 1},
       "schedule": {"name": "constant", "peak": 1e-3}}  # fmt: skip


def test_recipes_as_tables_files_and_not_at_all(dense, tmp_path):
    source = dense("llama")
    (tmp_path / "r.toml").write_text("[moe]\nnum_experts = 4\n")
    table = {"moe": {"num_experts": 4}}
    wanted = upcycle.plan(source, Recipe.of(table))
    for given in (table, tmp_path / "r.toml", str(tmp_path / "r.toml")):
        assert upcycle.plan(str(source), given) == wanted
    assert upcycle.plan(source, {}) == upcycle.plan(source) == upcycle.plan(source, Recipe.of())
    assert upcycle.blueprint(source, table).recipe == Recipe.of(table)
    upcycle.convert(str(source), str(tmp_path / "moe"), table)
    assert upcycle.verify(str(source), str(tmp_path / "moe"), logits=False).holds
    assert Recipe.of(Recipe.of(table), seed=3) == Recipe.of(table, seed=3)


@pytest.mark.parametrize("given", [5, [1], "nowhere.toml", "a\0b", b"r.toml"])
def test_what_is_no_recipe(given, dense):
    with pytest.raises(UpcycleError, match=r"is no recipe|no recipe at nowhere|NUL"):
        upcycle.plan(dense("llama"), given)


def test_a_run_by_its_path(tmp_path):
    (tmp_path / "run.toml").write_text(
        'source = "a"\nout = "b"\ndata.sources = [{path = "t.txt"}]\ntrain.steps = 1\n'
        'schedule = {name = "constant", peak = 1e-3}\n'
    )
    run = Run.of(RUN)
    assert Run.of(run) is run
    assert Run.of(str(tmp_path / "run.toml")) == Run.of(tmp_path / "run.toml") == run
    assert Run.of({**RUN, "source": Path("a")}) == run
    with pytest.raises(UpcycleError, match="is no run; give a Run"):
        Run.of(5)
    with pytest.raises(UpcycleError, match="no run file at nowhere"):
        upcycle.train("nowhere.toml")


def test_paths_as_text():
    assert ToScore(images="x") == ToScore(images=Path("x"))
    assert ToScore(text="x").texts == ToScore(text=["x"]).texts == (Path("x"),)
    assert ToCalibrate(images="x", cache="c") == ToCalibrate(images=Path("x"), cache=Path("c"))
    assert ToWatch(text={"code": "x"}) == ToWatch(text={"code": Path("x")})
    for wrong in (5, "a\0b", b"x"):
        with pytest.raises(UpcycleError, match="is no path"):
            ToScore(images=wrong)


def test_tokens_as_people_say_them():
    from upcycle.advice.situation import Budget

    assert Budget(tokens="100B", dense_tokens="15T") == Budget(tokens=10**11, dense_tokens=15 * 10**12)
    for wrong in ({"tokens": 1e9}, {"tokens": "many"}, {"tokens": 1, "gpus": "8"}):
        with pytest.raises(UpcycleError, match=r"--(tokens|gpus)"):
            Budget(**wrong)


def test_dir_shows_what_there_is():
    assert set(upcycle.__all__) <= set(dir(upcycle))
