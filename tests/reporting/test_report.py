"""`upcycle report`: what is compared with what, where curves cross, what is said of bad input, colours."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest

import left_behind
import upcycle
from damage import spoil
from left_behind import DENSE, LENGTH, MOE, ROWS, write_checkpoint, write_run
from upcycle import Recipe, UpcycleError, cli, convert
from upcycle.evaluation import results
from upcycle.evaluation.results import Metric, Result
from upcycle.reporting import drawing, figures, report, sections
from upcycle.reporting.comparison import Comparison, Group, compare
from upcycle.reporting.crossing import crossing, standing
from upcycle.reporting.document import Document, Picture, Sentence, Table
from upcycle.reporting.inks import DARK, LIGHT, VARIABLES, Inks
from upcycle.reporting.markdown import render as render_markdown
from upcycle.reporting.page import render
from upcycle.reporting.runs import read_run
from upcycle.reporting.starts import DenseCost, start_cost
from upcycle.reporting.study import study
from upcycle.training import loop, metrics
from upcycle.training.export import export
from upcycle.training.run import Run

BATCH = ROWS * LENGTH


def compared(*folders: Path, given: DenseCost | None = None) -> Comparison:
    return study(folders, given or DenseCost()).comparison


def group(found: Comparison, kind: str) -> Group:
    (only,) = [g for g in found.groups if g.kind == kind]
    return only


def document(*folders: Path, given: DenseCost | None = None) -> Document:
    return sections.document(study(folders, given or DenseCost()), "Report")


def tables(made: Document) -> dict[str, Table]:
    return {b.caption: b for s in made.sections for b in s.blocks if isinstance(b, Table)}


def pictures(made: Document) -> list[Picture]:
    return [b for s in made.sections for b in s.blocks if isinstance(b, Picture)]


def sentences(made: Document) -> list[str]:
    return [b.text for s in made.sections for b in s.blocks if isinstance(b, Sentence)]


# --- crossing ---


def test_two_straight_lines_cross_where_algebra_says():
    x = np.linspace(0, 10, 7)
    found = crossing(x, 5 - 0.7 * x, x, 4 - 0.4 * x)
    assert found.verdict == "crosses"
    assert found.x == pytest.approx(1 / 0.3)
    assert (found.end, found.gap) == (10.0, pytest.approx(1 - 3))


def test_curves_on_other_points_and_of_other_lengths():
    """What both cover decides, and the ends of one lie between the points of the other."""
    a, b = np.array([0.0, 3.0, 9.0]), np.array([2.0, 5.0, 6.0])
    found = crossing(a, 3 - a / 3, b, np.full(3, 1.5))
    assert found.x == pytest.approx(4.5)
    assert found.end == 6.0
    assert found.gap == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("a", "b", "verdict", "x"),
    [
        ([3, 2, 1], [2, 2, 2], "crosses", 1.0),  # through a point
        ([3, 3, 3], [2, 2, 2], "none", None),
        ([2, 2, 2], [2, 2, 2], "none", None),
        ([2, 1, 1], [2, 2, 2], "from the start", 0.0),  # an exact copy begins where the dense model is
        ([3, 1, 3], [2, 2, 2], "back above", None),
        ([1, 3, 1], [2, 2, 2], "crosses", 1.5),  # the last time counts
        ([1, 1, 2], [2, 2, 2], "back above", None),
    ],
)
def test_crossings_that_are_not_simple(a, b, verdict, x):
    points = np.arange(3.0)
    found = crossing(points, np.array(a, float), points, np.array(b, float))
    assert (found.verdict, found.x) == (verdict, x)


def test_curves_that_share_nothing_are_apart():
    one, none = np.array([0.0, 1.0]), np.array([])
    assert crossing(one, one, one + 1, one).verdict == "apart"
    assert crossing(one, one, none, none).verdict == "apart"


def test_crossings_against_a_fine_grid():
    """Random polygons: the crossing is where a dense sampling of the difference last changes its sign."""
    drawn = np.random.default_rng(0)
    for _ in range(50):
        x_a, x_b = (np.sort(drawn.uniform(0, 10, 6)) for _ in range(2))
        y_a, y_b = drawn.normal(size=(2, 6))
        found = crossing(x_a, y_a, x_b, y_b)
        grid = np.linspace(max(x_a[0], x_b[0]), min(x_a[-1], x_b[-1]), 200_001)
        gap = np.interp(grid, x_a, y_a) - np.interp(grid, x_b, y_b)
        above = np.flatnonzero(gap > 0)
        if gap[-1] >= 0:
            assert found.verdict in ("none", "back above")
        elif not above.size:
            assert found.verdict == "from the start"
        else:
            assert found.x == pytest.approx(grid[above[-1]], abs=2e-4)


# --- comparison ---


def pair_of_runs(folder: Path, **changes) -> tuple[Path, Path]:
    """A dense continuation that stays at 2 nats, and an MoE that falls by 1e-4 nats a token from 2.1."""
    dense = write_run(folder / "dense", lambda t: 2.0, steps=60, **changes)
    moe = write_run(folder / "moe", lambda t: 2.1 - 1e-4 * t, moe={}, **changes)
    return dense, moe


def test_the_crossing_of_two_runs_in_tokens_and_flops(tmp_path):
    """2.1 - t / 10^4 = 2 at 1,000 tokens: 1,000 tokens of the MoE are 1,000 x its FLOPs a token."""
    (pair,) = compared(*pair_of_runs(tmp_path)).pairs
    assert pair.tokens.x == pytest.approx(1000)
    assert pair.flops.x == pytest.approx(1000 * MOE)
    assert pair.with_start is None
    assert pair.flops.end == min(60 * BATCH * DENSE, 40 * BATCH * MOE)
    assert pair.flops.gap == pytest.approx(0.1 - 1e-4 * pair.flops.end / MOE)


def test_the_cost_of_the_start_is_added_to_what_began_there(tmp_path):
    """Both start from it: the crossing moves by it. A run from scratch has none: there it moves alone."""
    dense, moe = pair_of_runs(tmp_path)
    scratch = write_run(tmp_path / "scratch", lambda t: 2.05, from_scratch=True, steps=400)
    found = compared(dense, moe, scratch, given=DenseCost(flops=5e5, tokens=500))
    pairs = {pair.against.kind: pair for pair in found.pairs}
    both = pairs["dense, continued"]
    assert both.with_start.x == pytest.approx(both.flops.x + 5e5)
    alone = pairs["dense, from scratch"]
    assert alone.flops.x == pytest.approx(500 * MOE)
    assert alone.with_start.x == pytest.approx(500 * MOE + 5e5)
    assert group(found, "dense, from scratch").start.flops == 0.0


def test_runs_of_one_thing_are_averaged_over_seeds(tmp_path):
    shifts = (0.0, 0.1, 0.4)
    runs = [
        write_run(tmp_path / f"moe{i}", lambda t, s=shift: 2 + s - t / 1e5, moe={}, seed=i)
        for i, shift in enumerate(shifts)
    ]
    runs.append(write_run(tmp_path / "other", lambda t: 2.0, moe={"num_experts": 8}))
    three, one = compared(*runs).groups
    assert [len(g.runs) for g in (three, one)] == [3, 1]
    assert three.loss.value[0] == pytest.approx(2 + sum(shifts) / 3)
    assert three.loss.error == pytest.approx(np.full(5, np.std(shifts, ddof=1) / math.sqrt(3)))
    assert one.loss.error is None


REPEATS = {
    "a copied folder": {},
    "other ranks": {"parallel": {"tp": 2}},
    "other micro batches, compiled": {"train": {"micro_batch": 2, "compile": True}},
    "the same seed under its other key": {"seed": 7, "train": {"seed": 0}},
}


@pytest.mark.parametrize("case", REPEATS)
def test_a_seed_counts_once_however_often_it_is_trained(case, tmp_path):
    """Two runs of one seed end alike, so their standard error would be almost zero."""
    dense, moe = pair_of_runs(tmp_path)
    again = {"steps": 60, **REPEATS[case]}
    copy = write_run(tmp_path / "dense-again", lambda t: 2.0, **again)
    twin = write_run(tmp_path / "moe-again", lambda t: 2.1 - 1e-4 * t + 1e-6, moe={}, **REPEATS[case])
    found = study([copy, dense, twin, moe], DenseCost())
    assert [[run.name for run in g.runs] for g in found.groups] == [["dense"], ["moe"]]
    (pair,) = found.comparison.pairs
    assert (pair.paid, pair.error) == ("one seed", None)
    assert found.troubles() == [
        "dense-again is not compared: it repeats dense with the same seed, 0, and a seed counts once",
        "moe-again is not compared: it repeats moe with the same seed, 0, and a seed counts once",
    ]
    made = sections.document(found, "R")
    assert sentences(made)[0].startswith("One seed cannot tell. ")
    assert {row[:2] for row in tables(made)["Runs"].rows} >= {("moe-again", "not compared")}


def test_of_the_runs_of_a_seed_the_longest_counts_then_the_first_by_name(tmp_path):
    """Here all of them were evaluated at the same steps, and `cut` was killed after the last evaluation."""
    names = {"cut": (0, 19), "b": (0, 20), "c": (0, 20), "other": (1, 20)}
    curves = [
        write_run(tmp_path / name, lambda t, s=seed: 2.0 + s, seed=seed, done=done, steps=25, every=15)
        for name, (seed, done) in reversed(names.items())
    ]
    (only,) = compared(*curves).groups
    assert [run.name for run in only.runs] == ["other", "b"]
    assert [run.name for run in only.repeats] == ["c", "cut"]
    assert only.loss.error == pytest.approx(np.full(2, 0.5))


def test_train_seed_goes_over_seed(tmp_path):
    """It draws what differs between two trainings: the order of the data, jitter, dropout."""
    runs = [
        write_run(tmp_path / f"{i}", lambda t, i=i: 2.0 + i, train={"seed": seed}, seed=5)
        for i, seed in enumerate((1, 2))
    ]
    (only,) = compared(*runs).groups
    assert [run.seed for run in only.runs] == [1, 2]
    assert only.loss.error == pytest.approx(np.full(5, 0.5))
    about = json.loads((runs[0] / "run.json").read_text())
    about["run"]["seed"] = [5]
    del about["run"]["train"]["seed"]
    (runs[0] / "run.json").write_text(json.dumps(about))
    ((name, why),) = study(runs, DenseCost()).refused
    assert (name, why) == ("0", "its run.json is damaged: run.seed is [5], not a whole number")


def averaged(checkpoint: Path, steps: list[int] | None, **more) -> Path:
    """The checkpoint, which says that it is the mean of those after `steps`."""
    made = json.loads((checkpoint / "upcycle.json").read_text())
    made["training"][0] |= {"averaged_steps": steps} if steps else {}
    made["training"][0] |= more
    (checkpoint / "upcycle.json").write_text(json.dumps(made))
    return checkpoint


def test_exports_of_one_seed_are_no_seeds(tmp_path, monkeypatch):
    """A second export of the same step has a column of its own."""
    monkeypatch.setattr("upcycle.reporting.checkpoints._anatomy", lambda folder: None)
    runs = [write_run(tmp_path / f"moe{i}", lambda t: 2.0, moe={}, seed=i // 2) for i in range(3)]
    ends = [
        write_checkpoint(
            tmp_path / f"end{i}-{run.name}", run, eval=left_behind.scores(piqa=(0.5 + i / 10, 0.01))
        )
        for i, run in enumerate((runs[0], runs[0], runs[1], runs[2]))
    ]
    table = tables(document(*runs, *ends))["Scores on tasks"]
    (row,) = table.rows
    assert table.head[3:] == ("end1-moe0", "end2-moe1")
    assert row[2:] == ("0.6500 ± 0.1500", "0.6000 ± 0.0100", "0.7000 ± 0.0100 *")


def test_an_export_joins_its_run_after_that_was_lengthened(tmp_path, monkeypatch):
    """Also if it went on with another micro batch. A run in another folder is another run."""
    monkeypatch.setattr("upcycle.reporting.checkpoints._anatomy", lambda folder: None)
    run = write_run(tmp_path / "run", lambda t: 2.0, steps=20)
    early = write_checkpoint(tmp_path / "early", run, step=20)
    stranger = write_checkpoint(
        tmp_path / "stranger", write_run(tmp_path / "other", lambda t: 2.0, steps=20), step=20
    )
    shutil.rmtree(run)
    write_run(run, lambda t: 2.0, steps=40, train={"micro_batch": 2}, log={"every": 5})
    late = write_checkpoint(tmp_path / "late", run, step=40)
    found = study([run, early, late, stranger], DenseCost()).columns()
    assert [(c.label, c.checkpoints[0].name) for c in found] == [
        ("dense, continued", "late"), ("dense, continued, step 20", "early"), ("stranger", "stranger"),
    ]  # fmt: skip
    stages = [{"name": "warm", "train": {"steps": 10}}, {"name": "all", "train": {"steps": 10}}]
    longer = [stages[0], {"name": "all", "train": {"steps": 30}}]
    run = write_run(tmp_path / "staged", lambda t: 2.0, steps=20, stage=stages)
    early = write_checkpoint(tmp_path / "first", run, step=20)
    shutil.rmtree(run)
    write_run(run, lambda t: 2.0, steps=40, stage=longer)
    (column,) = study([run, early], DenseCost()).columns()
    assert column.label == "dense, continued, step 20"


def test_an_export_joins_the_run_that_it_names_whatever_other_length_is_there(tmp_path, monkeypatch):
    """Both runs wrote the same `out`. A run that a checkpoint does not name has taken its steps, too."""
    monkeypatch.setattr("upcycle.reporting.checkpoints._anatomy", lambda folder: None)
    out = {"out": "runs/x"}
    short, long = (write_run(tmp_path / f"of{n}", lambda t: 2.0, steps=n, **out) for n in (20, 40))
    early, late = (
        write_checkpoint(tmp_path / f"at{run.name}", run, step=n) for run, n in ((short, 20), (long, 40))
    )

    def owners(*folders: Path) -> list[str | None]:
        found = study([*folders, early, late], DenseCost())
        return [o and o[1].name for o in map(found.comparison.owner, found.checkpoints)]

    assert owners(short, long) == owners(long, short) == ["of20", "of40"]
    assert owners(short) == ["of20", None]
    assert owners(long) == ["of40", "of40"]


def test_a_mean_of_checkpoints_is_called_one(tmp_path, monkeypatch):
    """It shares a column with means of the same steps alone, and so does one expert of a model."""
    monkeypatch.setattr("upcycle.reporting.checkpoints._anatomy", lambda folder: None)
    runs = [write_run(tmp_path / f"moe{i}", lambda t: 2.0, moe={}, seed=i) for i in (0, 1)]
    kinds = {
        "end": (None, {}),
        "mean": ([20, 30, 40], {}),
        "other": ([10, 30, 40], {}),
        "ema": ([20, 40], {"average_decay": 0.5}),
        "expert": ([20, 40], {"expert": 2}),
    }
    ends = [
        averaged(write_checkpoint(tmp_path / f"{kind}{i}", run, eval=left_behind.scores(piqa=(0.5, 0.1))),
                 steps, **more)
        for i, run in enumerate(runs) for kind, (steps, more) in kinds.items()
    ]  # fmt: skip
    found = study([*runs, *ends], DenseCost())
    label = "4 experts, top-2, copy"
    assert [(c.label, [one.name for one in c.checkpoints]) for c in found.columns()] == [
        (label, ["end0", "end1"]),
        (f"{label}, expert 2, mean of 2", ["expert0", "expert1"]),
        (f"{label}, mean of 3", ["other0", "other1"]),
        (f"{label}, mean of 3", ["mean0", "mean1"]),
        (f"{label}, moving average of 2", ["ema0", "ema1"]),
    ]
    rows = {row[0]: row for row in tables(sections.document(found, "R"))["Checkpoints"].rows}
    assert rows["end0"][5] == "40"
    assert rows["mean0"][5] == "40 (mean of 20, 30, 40)"
    assert rows["ema1"][5] == "40 (moving average with decay 0.5 of 20, 40)"
    assert rows["expert0"][3] == "expert 2 of each layer"


def test_a_recipe_is_told_by_its_router(tmp_path, monkeypatch):
    monkeypatch.setattr("upcycle.reporting.checkpoints._anatomy", lambda folder: None)
    run = write_run(tmp_path / "run", lambda t: 2.0, moe={})
    recipes = {
        "routed": ({"router": {"name": "top_k"}}, "4 experts, top-2, drop"),
        "chosen": ({"router": {"name": "expert_choice"}}, "4 experts, expert choice, drop"),
        "deeper": ({"moe": {"target": "depth_tiled", "depth": 3}}, "every block 3 times"),
    }
    for name, (changes, _) in recipes.items():
        file = write_checkpoint(tmp_path / name, run) / "upcycle.json"
        made = json.loads(file.read_text()) | {"blueprint_hash": "0"}
        made["recipe"] = {"moe": {"num_experts": 4, "top_k": 2}, "init": {"name": "drop"}, **changes}
        file.write_text(json.dumps(made))
    found = tables(document(*(tmp_path / name for name in recipes)))["Checkpoints"].rows
    assert [row[3] for row in found] == [said for _, said in recipes.values()]


def test_an_unfinished_seed_is_a_curve_of_its_own(tmp_path):
    whole = write_run(tmp_path / "a", lambda t: 2.0, moe={}, seed=0)
    cut = write_run(tmp_path / "b", lambda t: 3.0, moe={}, seed=1, done=25)
    found = compared(whole, cut)
    assert [g.label for g in found.groups] == [
        "4 experts, top-2, copy", "4 experts, top-2, copy (25 of 40 steps)",
    ]  # fmt: skip
    assert found.groups[1].tokens.tolist() == [0, 10 * BATCH, 20 * BATCH]
    assert study([whole, cut], DenseCost()).troubles() == [
        "b is unfinished: 25 of 40 steps; shown as far as it goes"
    ]


def test_labels_say_what_tells_alike_runs_apart(tmp_path):
    """The source first, and no more settings than it takes."""
    changes = {"a": 1e-3, "b": 1e-3, "c": 1e-4}
    named = [
        write_run(tmp_path / name, lambda t: 2.0, source=f"/nowhere/{name.replace('c', 'a')}",
                  data={"tokenizer": "one"}, schedule={"peak": peak})
        for name, peak in changes.items()
    ]  # fmt: skip
    assert [g.label for g in compared(*named).groups] == [
        "dense, continued, source a, peak 0.001", "dense, continued, source b, peak 0.001",
        "dense, continued, source a, peak 0.0001",
    ]  # fmt: skip
    runs = [
        write_run(tmp_path / f"lr{peak}", lambda t: 2.0, schedule={"peak": peak}) for peak in (1e-3, 1e-4)
    ]
    assert [g.label for g in compared(*runs).groups] == [
        "dense, continued, peak 0.001", "dense, continued, peak 0.0001",
    ]  # fmt: skip


def test_labels_name_stages_and_leave_out_what_is_not_set(tmp_path):
    def stages(steps: int, *, then: str = "all") -> list[dict[str, Any]]:
        return [
            {"name": "warm", "train": {"steps": steps, "only": ["router"]}},
            {"name": then, "train": {"steps": 40 - steps}},
        ]

    def labels(**changes: dict[str, Any]) -> list[str]:
        runs = [
            write_run(tmp_path / f"{'-'.join(changes)}-{name}", lambda t: 2.0, moe={}, **change)
            for name, change in changes.items()
        ]
        return [g.label.removeprefix("4 experts, top-2, copy") for g in compared(*runs).groups]

    assert labels(one={"stage": stages(10)}, none={}) == [", stages warm, all", ", no stages"]
    assert labels(a={"stage": stages(10)}, b={"stage": stages(10, then="rest")}, c={}) == [
        ", stages warm, all", ", stages warm, rest", ", no stages",
    ]  # fmt: skip
    assert labels(early={"stage": stages(10)}, late={"stage": stages(20)}) == [
        ", all: steps 30", ", all: steps 20",
    ]  # fmt: skip
    assert labels(plain={}, muon={"optimizer": {"name": "muon"}}) == ["", ", optimizer muon"]
    moe = {"num_experts": 4, "top_k": 2}
    assert labels(even={"decoder": {"moe": moe}}, odd={"decoder": {"moe": {**moe, "num_experts": 8}}}) == [
        "", ", decoder: num_experts 8",
    ]  # fmt: skip
    assert labels(untaught={}, taught={"teacher": {"source": "/nowhere/big", "weight": 0.5}}) == [
        "", ", teacher big",
    ]  # fmt: skip
    frozen = labels(most={"train": {"only": ["router", "norms"]}}, few={"train": {"only": ["router"]}})
    assert frozen == [", only norms", ""]


@pytest.mark.parametrize(
    ("task", "given", "drawn"),
    [("sft", {}, True), ("sft", {"test": "a.jsonl"}, False), ("causal_lm", {}, False)],
)
def test_runs_that_are_compared_hold_out_the_same_examples(tmp_path, task, given, drawn):
    """Examples are drawn by `data.split_seed`, and in earlier versions by the seed of the run."""
    first = write_run(tmp_path / "first", lambda t: 2.0, task=task)
    second = write_run(tmp_path / "second", lambda t: 2.1, task=task, seed=1, data={"split_seed": 0})
    earlier = write_run(tmp_path / "earlier", lambda t: 2.2, task=task, seed=1, moe={})
    for run in (first, second, earlier):
        about = json.loads((run / "run.json").read_text())
        about["run"]["task"] = given
        (run / "run.json").write_text(json.dumps(about))
    found = compared(first, second, earlier)
    assert [run.name for run, _ in found.foreign] == ["earlier"] * drawn
    assert [run.seed for run in found.groups[0].runs] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"held_out": 0.2}}, r"other held-out data: 0\.2, .* have 0\.1"),
        ({"data": {"sources": [{"path": "plays.txt", "weight": 1.0}]}}, r"plays\.txt, .* have corpus\.jsonl"),
        ({"data": {"isolate": True}}, r"other held-out data: True, .* have False"),
        (
            {"stage": [{"train": {"steps": 1}}, {"train": {"steps": 1}, "data": {"held_out": 0.2}}]},
            r"other held-out data: 0\.2, .* not set \(held-out data\.then\.0\.share",
        ),
        ({"data": {"tokenizer": "/some/other"}}, r"other tokenizer: /some/other, .* have /nowhere/dense"),
        ({"train": {"eval_tokens": 512}}, r"other rows that are held out: 32, .* have 16"),
        ({"task": "masked_lm"}, r"other task: masked_lm, .* have causal_lm"),
    ],
)
def test_runs_that_are_not_comparable_are_named_and_the_rest_is_compared(tmp_path, changes, said):
    dense, moe = pair_of_runs(tmp_path)
    foreign = write_run(tmp_path / "foreign", lambda t: 0.5, **changes)
    found = study([foreign, dense, moe], DenseCost())
    ((run, reason),) = found.comparison.foreign
    assert run.name == "foreign"
    assert re.search(said, reason)
    assert len(found.comparison.pairs) == 1
    assert "foreign" in {row[0] for row in tables(sections.document(found, "R"))["Runs"].rows}


def test_a_tokenizer_is_known_by_its_bytes(tmp_path):
    """The same file in another folder is the same tokenizer."""
    folders = []
    for name, text in (("a", "{}"), ("b", "{}"), ("c", "{ }")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(text)
        folders.append(write_run(tmp_path / f"run-{name}", lambda t: 2.0, source=str(tmp_path / name)))
    assert [run.name for run, _ in compared(*folders).foreign] == ["run-c"]


def test_a_tokenizer_outlives_its_folder(tmp_path):
    """As the copy that a run keeps, or as that of a source with the same weights."""
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    there, gone = (
        hashed(write_run(tmp_path / f"of-{name}", lambda t: 2.0, source=str(tmp_path / name)), "1")
        for name in ("dense", "gone")
    )
    other = hashed(write_run(tmp_path / "of-other", lambda t: 2.0, source=str(tmp_path / "other")), "2")
    kept = write_run(tmp_path / "kept", lambda t: 2.0, data={"tokenizer": "gone too"})
    (kept / "beside" / "tokenizer-0").mkdir(parents=True)
    (kept / "beside" / "tokenizer-0" / "tokenizer.json").write_text("{}")
    assert [run.name for run, _ in compared(gone, other, there, kept).foreign] == ["of-other"]
    assert compared(gone, hashed(there, "1")).foreign == ()


def test_seeds_are_those_of_one_checkpoint_however_its_path_is_written(tmp_path):
    """Another checkpoint at the same path is another model."""

    def runs(role: str, *given: tuple[str, str | None]) -> list[tuple[str, int]]:
        folder, made = tmp_path / role, []
        for seed, (path, sha256) in enumerate(given):
            where = folder / f"{len(list(folder.glob('*')))}"
            named = {
                "source": {"source": path},
                "teacher": {"teacher": {"source": path}},
                "tokenizer": {"data": {"tokenizer": path}, "stage": [{"data": {"tokenizer": path}}]},
            }[role]
            run = write_run(where, lambda t: 2.0, seed=seed, **{"data": {"tokenizer": "one"}, **named})
            made.append(hashed(run, sha256, role))
        return [(group.label, len(group.runs)) for group in compared(*made).groups]

    for role in ("source", "teacher"):
        one = ("dense", "1"), ("./dense", "1"), ("/home/dense", "1")
        assert runs(role, *one) == [("dense, continued", 3)]
        assert runs(role, *one[:2], ("small", "2")) == [
            (f"dense, continued, {role} dense", 2), (f"dense, continued, {role} small", 1)
        ]  # fmt: skip
        found = runs(role, *one[:2], ("dense", "2"))
        assert [count for _, count in found] == [2, 1]
        assert len({label for label, _ in found}) == 2
        assert runs(role, ("dense", None), ("dense", "1"), ("/home/dense", "1")) == [("dense, continued", 3)]
    words = tmp_path / "words"
    words.mkdir()
    (words / "tokenizer.json").write_text("{}")
    written = [(f"{words}{more}", None) for more in ("", "/.", "/../words")]
    assert runs("tokenizer", *written) == [("dense, continued", 3)]


# --- stages of unequal cost ---


def with_stages(run: Path, *costs: tuple[int, int]) -> Path:
    """Record for each stage the steps before it and the FLOPs of a token; the mean is that of 40 steps."""
    about = json.loads((run / "run.json").read_text())
    firsts = [first for first, _ in costs]
    steps = np.diff([*firsts, 40])
    mean = int(sum(n * flops for n, (_, flops) in zip(steps, costs, strict=True)) / 40)
    about |= {"training_flops_per_row": mean * LENGTH, "training_flops_per_token": mean}
    about["stage_costs"] = [{"first": f, "training_flops_per_row": flops * LENGTH} for f, flops in costs]
    (run / "run.json").write_text(json.dumps(about))
    return run


def test_flops_are_added_up_stage_by_stage(tmp_path):
    """10 steps of a router alone, then 30 of everything: each step counts what it cost."""
    costs = [100] * 10 + [900] * 30
    spent = BATCH * np.array([0, *np.cumsum(costs)])
    made = with_stages(write_run(tmp_path / "moe", lambda t: 2.0, moe={}), (0, 100), (10, 900))
    run = read_run(made, "moe")
    assert run.flops(np.arange(41.0) * BATCH).tolist() == spent.tolist()
    assert run.flops(np.array(5.5 * BATCH)) == 5.5 * BATCH * 100
    assert run.flops(np.array([])).tolist() == []
    assert run.flops(np.array(50.0 * BATCH)) == spent[40] + 10 * BATCH * 900  # of a longer last stage
    only = group(compared(made), "upcycled")
    assert only.flops.tolist() == spent[[0, 10, 20, 30, 40]].tolist()
    about = json.loads((made / "run.json").read_text())
    del about["stage_costs"]  # as older versions wrote it: the mean alone
    (made / "run.json").write_text(json.dumps(about))
    assert read_run(made, "moe").flops(np.array([10.0, 40.0]) * BATCH).tolist() == [
        10 * BATCH * 700, spent[40],
    ]  # fmt: skip


def test_the_crossing_and_the_end_of_a_run_of_stages(tmp_path):
    """The MoE falls below 2 nats at step 20, and an unfinished run has spent what its steps cost."""
    dense = write_run(tmp_path / "dense", lambda t: 2.0, steps=60)
    curve = {"curve": lambda t: 2.1 - 0.1 * t / (20 * BATCH), "moe": {}}
    moe = with_stages(write_run(tmp_path / "moe", **curve), (0, 100), (10, 900))
    (pair,) = compared(dense, moe).pairs
    assert pair.tokens.x == pytest.approx(20 * BATCH)
    assert pair.flops.x == pytest.approx(10 * BATCH * 100 + 10 * BATCH * 900)
    cut = with_stages(write_run(tmp_path / "cut", **curve, done=12, every=5), (0, 100), (10, 900))
    (row,) = tables(document(cut))["Runs"].rows
    assert row[-1] == "1.79e05"  # 64 tokens x (10 x 100 + 2 x 900)


# --- the cost of the start ---


def test_provenance_tells_the_cost_of_a_start_back_to_random_weights(tmp_path):
    first = write_run(tmp_path / "r0", lambda t: 3.0, from_scratch=True)
    dense = write_checkpoint(tmp_path / "dense", first, step=40)
    second = write_run(tmp_path / "r1", lambda t: 2.5, source=str(dense))
    further = write_checkpoint(tmp_path / "further", second, step=30)
    last = read_run(write_run(tmp_path / "r2", lambda t: 2.0, source=str(further), moe={}), "r2")
    cost = start_cost(last, DenseCost())
    assert cost.tokens == 70 * BATCH
    assert cost.flops == 70 * BATCH * DENSE
    assert "dense was trained from random weights" in cost.why


def test_the_cost_of_a_start_is_that_of_its_own_steps(tmp_path):
    """An export says what its steps cost; the mean of its run, which older ones have, is of all stages."""
    first = with_stages(write_run(tmp_path / "r0", lambda t: 3.0, from_scratch=True), (0, 100), (10, 900))
    dense = write_checkpoint(tmp_path / "dense", first, step=10)
    last = read_run(write_run(tmp_path / "r1", lambda t: 2.0, source=str(dense), moe={}), "r1")
    assert start_cost(last, DenseCost()).flops == 10 * BATCH * 700
    made = json.loads((dense / "upcycle.json").read_text())
    made["training"][0]["training_flops"] = 10.0 * BATCH * 100
    (dense / "upcycle.json").write_text(json.dumps(made))
    assert start_cost(last, DenseCost()).flops == 10 * BATCH * 100
    made["training"][0]["training_flops"] = math.inf
    (dense / "upcycle.json").write_text(json.dumps(made))
    assert start_cost(last, DenseCost()).why == "the provenance of dense is damaged"


def test_a_start_of_unknown_cost_says_so_and_takes_what_is_given(tmp_path):
    silent = tmp_path / "silent"
    silent.mkdir()
    second = write_run(tmp_path / "r1", lambda t: 2.5, source=str(silent))
    further = write_checkpoint(tmp_path / "further", second, step=30)
    run = read_run(write_run(tmp_path / "r2", lambda t: 2.0, source=str(further)), "r2")
    assert start_cost(run, DenseCost()).flops is None
    assert start_cost(run, DenseCost()).why.endswith("silent does not say how it was trained")
    assert start_cost(run, DenseCost(flops=1e6)).flops == 1e6 + 30 * BATCH * DENSE
    assert start_cost(run, DenseCost(flops=1e6)).tokens is None
    gone = read_run(write_run(tmp_path / "r3", lambda t: 2.0), "r3")
    assert start_cost(gone, DenseCost()).why == "dense is not there any more"


def test_provenance_that_goes_round_in_a_circle_ends(tmp_path):
    run = write_run(tmp_path / "r", lambda t: 2.0, source=str(tmp_path / "a"))
    write_checkpoint(tmp_path / "a", run)
    assert start_cost(read_run(run, "r"), DenseCost()).flops is None


# --- the document ---


def whole_study(folder: Path) -> list[Path]:
    """Runs of two seeds and two kinds, an unfinished one, and checkpoints with scores and routing."""
    dense = [
        write_run(folder / f"dense{i}", lambda t, i=i: 2.5 - 1e-4 * t + i / 100, steps=60, seed=i)
        for i in (0, 1)
    ]
    moe = [
        write_run(folder / f"moe{i}", lambda t, i=i: 2.6 - 3e-4 * t + i / 100, moe={}, seed=i) for i in (0, 1)
    ]
    cut = write_run(folder / "<script>alert(1)</script>".replace("/", ""), lambda t: 3.0, moe={}, done=15)
    ends = [
        write_checkpoint(folder / "dense-end", dense[0], step=60, eval=left_behind.scores(piqa=(0.6, 0.01))),
        write_checkpoint(
            folder / "moe-end0",
            moe[0],
            eval=left_behind.scores(piqa=(0.62, 0.01)),
            routing=left_behind.ROUTING,
        ),
        write_checkpoint(folder / "moe-end1", moe[1], eval=left_behind.scores(piqa=(0.66, 0.01))),
    ]
    return [*dense, *moe, cut, *ends]


@pytest.fixture
def given_folders(tmp_path, monkeypatch):
    """The folders of `whole_study`; they have no weights, so nothing is said of experts."""
    monkeypatch.setattr("upcycle.reporting.checkpoints._anatomy", lambda folder: None)
    return whole_study(tmp_path / "given")


@pytest.mark.parametrize(("given", "tokens"), [("1B", 10**9), ("1e9", 10**9), ("2_000_000", 2 * 10**6)])
def test_tokens_of_the_dense_model_are_written_as_for_advise(given, tokens, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(
        "upcycle.reporting.report", lambda *_, dense_tokens, **more: taken.append(dense_tokens) or []
    )
    cli.main(["report", "run", "--out", str(tmp_path / "r.html"), "--dense-tokens", given])
    assert taken == [tokens]
    with pytest.raises(UpcycleError, match="--dense-tokens 'many'; give a number of tokens"):
        upcycle.report("run", tmp_path / "r.html", dense_tokens="many")


def test_the_answer_and_the_numbers_of_the_tables(given_folders):
    made = document(*given_folders)
    assert sentences(made)[0].startswith("Yes. At equal training FLOPs")
    found = tables(made)
    end = 60 * BATCH * DENSE  # the dense runs spend less; there the MoE has seen end / MOE tokens
    ours, theirs = 2.605 - 3e-4 * end / MOE, 2.505 - 1e-4 * 60 * BATCH
    error = math.hypot(0.005, 0.005)
    row = found["Held-out loss at equal training FLOPs"].rows[0]
    assert row[2:6] == ("yes", "3.84e06", f"{ours:.4f}", f"{theirs:.4f}")
    assert row[6] == f"−{theirs - ours:.4f} ± {error:.4f}"
    assert found["Routers at the end of training"].rows[0][1:] == (
        "2", "0.780", "0.780", "1.60", "2 of 8", "0", "2.00%"
    )  # fmt: skip
    (scored,) = found["Scores on tasks"].rows
    assert scored == ("piqa", "accuracy ↑", "0.6000 ± 0.0100", "0.6400 ± 0.0200 *")  # 0.62, 0.66: over seeds
    on_texts = found["Routers of moe-end0 on what it was shown"]
    assert on_texts.rows[0] == ("1", "0.6000", "0.0000", "0.2500")
    assert on_texts.note == "Domains: stories, plays."
    assert found["Speed of training"].rows[0][2:] == (
        "0.5", "128", "128 to 128", "1.28e05", "–", "123.00 MB", "30 s"
    )  # fmt: skip


def test_scores_on_other_data_stand_in_rows_of_their_own(tmp_path, monkeypatch):
    """And of one checkpoint's entries for the same question the last counts, once."""
    monkeypatch.setattr("upcycle.reporting.checkpoints._anatomy", lambda folder: None)

    def scored(name: str, *found: tuple[float, int]) -> Path:
        parts = [left_behind.scores(piqa=(value, None))["results"][0] | {"data": {"limit": limit}}
                 for value, limit in found]  # fmt: skip
        return write_checkpoint(tmp_path / name, eval={"format": 1, "results": parts})

    made = document(scored("a", (0.1, 0), (0.5, 0)), scored("b", (0.6, 0)), scored("c", (0.9, 50)))
    assert tables(made)["Scores on tasks"].rows == (
        ("piqa (limit 0)", "accuracy ↑", "0.5000", "0.6000 *", "–"),
        ("piqa (limit 50)", "accuracy ↑", "–", "–", "0.9000"),
    )


def test_a_name_with_blanks_links_to_its_figures(given_folders, tmp_path):
    report(given_folders, tmp_path / "r.html", markdown=tmp_path / "my report (1).md")
    text = (tmp_path / "my report (1).md").read_text()
    links = re.findall(r"^!\[.*\]\((\S+)\)$", text, re.MULTILINE)
    assert len(links) == text.count("\n![") > 0
    assert all((tmp_path / unquote(link)).is_file() for link in links)


def test_a_cost_that_is_no_number(given_folders, tmp_path):
    with pytest.raises(UpcycleError, match="--dense-flops = '1e20'; it must be a number of 0 or more"):
        report(given_folders, tmp_path / "r.html", dense_flops="1e20")


def test_losses_by_the_tokens_of_two_tokenizers_stand_in_rows_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("upcycle.reporting.checkpoints._anatomy", lambda folder: None)

    def scored(name: str, loss: float, bits: float, tokenizer: str) -> Path:
        metrics = {
            "loss": Metric(value=loss, standard_error=None, higher_is_better=False, per_token=True),
            "bits_per_byte": Metric(value=bits, standard_error=None, higher_is_better=False),
        }
        folder = write_checkpoint(tmp_path / name)
        result = Result(kind="text", name="a.txt", data={"file": "a.txt"}, metrics=metrics)
        results.record(folder, [result], tokenizer)
        return folder

    made = document(scored("a", 2.8, 1.1, "one"), scored("b", 2.7, 1.0, "one"), scored("c", 5.5, 0.9, "two"))
    assert tables(made)["Scores on texts"].rows == (
        ("a.txt (tokenizer one)", "loss ↓", "2.8000", "2.7000 *", "–"),
        ("a.txt", "bits_per_byte ↓", "1.1000", "1.0000", "0.9000 *"),
        ("a.txt (tokenizer two)", "loss ↓", "–", "–", "5.5000"),
    )


def test_with_the_start_given_curves_are_shown_both_ways(given_folders):
    names = [p.name for p in pictures(document(*given_folders))]
    assert "loss-flops" in names
    assert "loss-flops-with-start" not in names
    given = document(*given_folders, given=DenseCost(flops=1e6, tokens=1e3))
    assert "loss-flops-with-start" in [p.name for p in pictures(given)]
    assert {row[3] for row in tables(given)["The cost of the start"].rows} == {"1.00e06"}
    assert len({p.name for p in pictures(given)}) == len(pictures(given))


def test_losing_and_nothing_shown_are_called_that(tmp_path):
    def answer(folder: Path, shift: float) -> str:
        runs = [write_run(folder / f"d{i}", lambda t, i=i: 2.0 + i / 100, seed=i) for i in (0, 1)]
        runs += [
            write_run(folder / f"m{i}", lambda t, i=i: 2.0 + shift + i / 100, moe={}, seed=i) for i in (0, 1)
        ]
        return sentences(document(*runs))[0]

    assert answer(tmp_path / "lost", 0.1).startswith("No. ")
    assert "0.1000 ± 0.0071 nats per token behind" in answer(tmp_path / "lost2", 0.1)
    assert answer(tmp_path / "even", -0.01).startswith("That was not shown. ")
    dense = write_run(tmp_path / "alone", lambda t: 2.0)
    assert "nothing to answer" in sentences(document(dense))[0]
    moe = write_run(tmp_path / "no-dense", lambda t: 2.0, moe={})
    assert "No run that continues the dense model" in sentences(document(moe))[0]


def hashed(folder: Path, sha256: str | None, role: str = "source") -> Path:
    """A run that recorded this hash of its source, or none as older versions did."""
    about = json.loads((folder / "run.json").read_text())
    if sha256 is not None:
        about["source_sha256"] = {role: {"model.safetensors": sha256}, "donor 1": {"x": folder.name}}
    (folder / "run.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    ("dense_at", "moe_at", "same"),
    [
        (("/a/dense", "1"), ("/b/copy", "1"), True),
        (("/a/dense", "1"), ("/a/dense", "2"), False),  # it was written anew in between
        (("/a/dense", None), ("/a/dense", "1"), True),
        (("/a/dense", None), ("/b/dense", "1"), False),
    ],
)
def test_only_the_same_source_trained_on_answers_whether_it_paid(tmp_path, dense_at, moe_at, same):
    """A better start is no merit of the experts."""

    def runs(name: str, shift: float, source: tuple[str, str | None], moe=None) -> list[Path]:
        return [
            hashed(
                write_run(tmp_path / f"{name}{i}", lambda t, i=i: shift + i / 100, moe=moe, seed=i,
                          source=source[0], data={"tokenizer": "one"}),
                source[1],
            )
            for i in (0, 1)
        ]  # fmt: skip

    dense, moe = runs("dense", 2.5, dense_at), runs("moe", 2.0, moe_at, {})
    made = document(*dense, *moe)
    against = tables(made)["Where the Mixture of Experts comes below, to stay"].rows[0][1]
    if same:
        assert sentences(made)[0].startswith("Yes. ")
        assert against == "dense, continued"
        return
    assert sentences(made)[0].startswith("No run continues a dense model that a Mixture of Experts here was")
    assert "Held-out loss at equal training FLOPs" not in tables(made)
    assert against == "dense, continued (of another source)"
    # Beside a pair of one source it is named, and the answer is that of the pair.
    made = document(*dense, *moe, *runs("other", 2.6, dense_at, {"num_experts": 8}))
    assert sentences(made)[0].startswith("No. At equal training FLOPs the Mixture of Experts (8 experts")
    assert sentences(made)[1].startswith("4 experts, top-2, copy is in no row: no run here continues")
    assert len(tables(made)["Held-out loss at equal training FLOPs"].rows) == 1


def test_a_grown_model_has_no_dense_baseline(tmp_path):
    """To train its source without experts is what upcycle refuses, so no report advises it."""
    grown = write_run(tmp_path / "grown", lambda t: 2.0, source="/nowhere/moe", moe={"target": "grown"},
                      grow={"factor": 2}, data={"tokenizer": "one"})  # fmt: skip
    (said,) = [b.text for b in document(grown).sections[0].blocks]
    assert said.startswith("The runs are of models that grew out of a Mixture of Experts")
    dense, moe = pair_of_runs(tmp_path, data={"tokenizer": "one"})
    said = sentences(document(grown, dense, moe))
    assert said[0].startswith("One seed cannot tell.")
    assert said[1] == (
        "4 experts, top-2, grown is in no row: it grew out of a Mixture of Experts, and no dense model is "
        "its baseline."
    )
    others = [block for s in document(grown, dense).sections for block in s.blocks if hasattr(block, "text")]
    assert "[moe]" not in " ".join(block.text for block in others)


def test_the_answer_is_that_against_the_best_dense_model(tmp_path):
    """Here one was trained at two rates, and once for so short a time that nobody could have gained."""
    dense = {(1e-3, 60): 2.5, (1e-5, 60): 2.9, (1e-3, 5): 2.8}
    runs = [
        write_run(tmp_path / f"d{peak}{steps}", lambda t, end=end: end, steps=steps, schedule={"peak": peak})
        for (peak, steps), end in dense.items()
    ]
    runs.append(write_run(tmp_path / "moe", lambda t: 2.7, moe={}))
    made = document(*runs)
    assert len(tables(made)["Held-out loss at equal training FLOPs"].rows) == 3
    assert (
        "the Mixture of Experts (4 experts, top-2, copy) is 0.2000 nats per token behind the best of the "
        "dense models that were trained on, dense, continued, "
    ) in sentences(made)[0]


def test_of_dense_models_the_best_counts_and_not_the_longest(tmp_path):
    """The one that ends first has the lower loss for fewer FLOPs, so no MoE is ahead of the best of them."""
    moe = seeds(tmp_path, "moe", 2.7, moe={})
    good = seeds(tmp_path, "good", 2.6, steps=54)
    bad = seeds(tmp_path, "bad", 2.8, steps=66, schedule={"peak": 0.1})
    made = document(*moe, *good, *bad)
    rows = tables(made)["Held-out loss at equal training FLOPs"].rows
    assert {row[1]: row[2] for row in rows} == {
        "dense, continued, steps 54": "no", "dense, continued, steps 66": "yes",
    }  # fmt: skip
    assert sentences(made)[0].startswith("No. ")
    assert (
        "the best of the dense models that were trained on, dense, continued, steps 54" in sentences(made)[0]
    )


def test_one_seed_of_a_better_model_does_not_hide_a_yes(tmp_path):
    """Nor does one that is clearly behind answer for a better one of one seed. Both are named."""
    dense = seeds(tmp_path, "dense", 2.8, steps=60)
    better = seeds(tmp_path, "better", 2.6, count=1, moe={"num_experts": 8})
    only = sentences(document(*dense, *better))[0]
    assert only.startswith("One seed cannot tell. At equal training FLOPs the Mixture of Experts (8 experts")
    clear = seeds(tmp_path, "clear", 2.65, moe={})
    said = sentences(document(*dense, *better, *clear))[0]
    assert said.startswith(
        "Yes. At equal training FLOPs one of the Mixtures of Experts (4 experts, top-2, copy) is 0.1500 ± "
    )
    assert said.endswith(
        " 8 experts, top-2, copy is 0.2005 nats per token ahead of the same dense model (one seed)."
    )
    behind = seeds(tmp_path, "behind", 2.9, moe={})
    said = sentences(document(*dense, *better, *behind))[0]
    assert said.startswith(
        "One seed cannot tell. At equal training FLOPs the best of the Mixtures of Experts (8 experts"
    )
    assert " 4 experts, top-2, copy is 0.1000 ± " in said
    assert said.endswith(" nats per token behind the same dense model (2 seeds).")


def test_what_was_measured_tells_the_same_however_often(tmp_path):
    """Curves that fall: with fewer evaluations the answer is the same one, or that it cannot be told."""

    def runs(every: int, shift: float) -> list[Path]:
        folder = tmp_path / f"{every}{shift}"
        curves = {
            "d": (None, lambda t: 2 + math.exp(-t / 700)),
            "m": ({}, lambda t: 2 - shift + 1.1 * math.exp(-t / 400)),
        }
        return [
            write_run(
                folder / f"{name}{i}", lambda t, f=curve, i=i: f(t) + i / 1000, moe=moe, seed=i, steps=60,
                every=every, train={"eval_every": 10},
            )
            for name, (moe, curve) in curves.items() for i in (0, 1)
        ]  # fmt: skip

    for shift, start, paid in ((0.05, "Yes. ", "yes"), (-0.4, "No. ", "no")):
        (exact,) = compared(*runs(1, shift)).pairs
        assert exact.paid == paid
        for every in (2, 5, 12, 20, 60):
            folders = runs(every, shift)
            (found,) = compared(*folders).pairs
            assert found.standing.low <= exact.standing.low <= exact.standing.high <= found.standing.high
            assert found.paid in (paid, "cannot be told")
            said = sentences(document(*folders))[0]
            assert said.startswith(start if found.paid == paid else "That cannot be told. ")
            if paid == "yes" and found.standing.since is not None:
                after, by = found.standing.since
                assert (after or 0) <= exact.standing.since[0] <= exact.standing.since[1] <= by
    # At its start and its end alone.
    assert "FLOPs one of them was not evaluated, but at 0 and 5.76e06" in said
    assert found.paid == "no"
    folders = sorted((tmp_path / "600.05").iterdir())
    assert "ahead of and" in sentences(document(*folders))[0]
    (row,) = tables(document(*folders))["Held-out loss at equal training FLOPs"].rows
    assert row[2] == "cannot be told"


def test_a_run_whose_loss_is_no_number_any_more_is_not_the_best(tmp_path):
    """Its curve ends before, at a loss that nobody can have; and what was skipped is said."""
    dense, moe = pair_of_runs(tmp_path)
    lost = write_run(tmp_path / "lost", lambda t: 1.0 if t < 30 * BATCH else math.nan, moe={"top_k": 1})
    lines = [json.loads(line) for line in (moe / "metrics.jsonl").read_text().splitlines()]
    lines[5]["skipped"] = lines[6]["skipped"] = "stands out"
    (moe / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = document(dense, moe, lost)
    said = sentences(made)
    assert "the best of the Mixtures of Experts (4 experts, top-2, copy) is" in said[0]
    assert tables(made)["Runs"].rows[2][:2] == ("lost", "4 experts, top-1, copy (diverged)")
    assert "lost: its held-out loss is not finite at step 30, 40; curves leave that out" in said
    assert (
        "moe did not update its weights in 2 of 40 steps, which stood out or were not finite; their tokens "
        "and FLOPs count"
    ) in said


def seeds(folder: Path, name: str, end: float, lost: int = 0, count: int = 2, **more) -> list[Path]:
    """Runs of some seeds that fall from 3 nats to about `end`; the first `lost` diverge at step 30."""
    length = more.get("steps", 40) * BATCH

    def curve(seed: int, tokens: float) -> float:
        falls = 3 - (3 - end) * tokens / length + seed / 1000
        return math.nan if seed < lost and tokens >= 30 * BATCH else falls

    return [
        write_run(folder / f"{name}{seed}", lambda t, s=seed: curve(s, t), seed=seed, **more)
        for seed in range(count)
    ]


def test_a_model_that_diverged_has_not_paid(tmp_path):
    """It is ahead where its curve ends, which is before its loss is no number any more."""
    dense = seeds(tmp_path, "dense", 2.8, steps=60)
    lost = seeds(tmp_path, "lost", 2.0, lost=2, moe={"top_k": 1})
    made = document(*dense, *lost)
    label = "4 experts, top-1, copy (diverged)"
    assert sentences(made)[0] == (
        f"No. The Mixture of Experts diverged: the last held-out loss of {label} is not a finite number."
    )
    rows = tables(made)["Held-out loss at equal training FLOPs"].rows
    assert [row[:3] for row in rows] == [(label, "dense, continued", "no")]
    assert rows[0][-1].startswith("−")
    (row,) = tables(made)["Where the Mixture of Experts comes below, to stay"].rows
    assert row[2:5] == ("diverged", "diverged", "not known")
    # Beside a sound one the answer is that of the sound one.
    sound = seeds(tmp_path, "sound", 2.5, moe={})
    made = document(*dense, *lost, *sound)
    assert sentences(made)[0].startswith(
        "Yes. At equal training FLOPs the best of the Mixtures of Experts (4 experts, top-2, copy) is "
    )
    rows = tables(made)["Held-out loss at equal training FLOPs"].rows
    assert {row[0]: row[2] for row in rows} == {label: "no", "4 experts, top-2, copy": "yes"}
    more = seeds(tmp_path, "more", 2.0, lost=2, moe={"num_experts": 8})
    assert sentences(document(*dense, *lost, *more))[0].startswith("No. Every Mixture of Experts diverged: ")


def test_one_that_diverged_before_it_had_a_loss_has_not_paid(tmp_path):
    dense = seeds(tmp_path, "dense", 2.8)
    lost = write_run(tmp_path / "lost", lambda t: math.nan if t else 3.0, moe={})
    assert sentences(document(*dense, lost))[0].startswith("No. The Mixture of Experts diverged: ")


def test_a_dense_model_that_diverged_is_nothing_to_be_ahead_of(tmp_path):
    lost = seeds(tmp_path, "lost", 2.9, lost=2, steps=60)
    moe = seeds(tmp_path, "moe", 2.5, moe={})
    made = document(*lost, *moe)
    assert sentences(made)[0] == (
        "That cannot be told. The dense model that was trained on diverged, so there is nothing to compare "
        "with: the last held-out loss of dense, continued (diverged) is not a finite number."
    )
    assert tables(made)["Held-out loss at equal training FLOPs"].rows[0][2] == "cannot be told"
    dense = seeds(tmp_path, "dense", 2.2, steps=60, schedule={"peak": 1e-4})
    made = document(*lost, *moe, *dense)
    assert sentences(made)[0].startswith("No. ")
    assert "trained on, dense, continued (2 seeds" in sentences(made)[0]
    rows = tables(made)["Held-out loss at equal training FLOPs"].rows
    assert {row[1]: row[2] for row in rows} == {
        "dense, continued (diverged)": "cannot be told", "dense, continued": "no",
    }  # fmt: skip


def test_points_that_differ_by_rounding_are_one():
    x = np.array([0.0, 0.1 + 0.2, 1.0])
    found = standing(x, np.array([3.0, 2.0, 1.0]), np.array([0.0, 0.3]), np.array([4.0, 2.5]))
    assert (found.low, found.high, found.between) == (-0.5, -0.5, None)
    apart = standing(np.array([5.0, 6.0]), np.ones(2), np.array([0.0, 1.0]), np.ones(2))
    assert apart.sign == standing(np.array([]), np.array([]), x, x).sign == "apart"
    again = standing(x, np.array([3.0, 2.0, 3.0]), x, np.array([2.5, 2.5, 2.5]))
    assert (again.sign, again.lost_again, again.since) == ("above", True, None)


def test_one_seed_tells_neither_yes_nor_no(tmp_path, monkeypatch):
    """Where both were scored on the same documents, what that says stands there, with its error."""
    monkeypatch.setattr("upcycle.reporting.checkpoints._anatomy", lambda folder: None)
    dense, moe = pair_of_runs(tmp_path)
    made = document(dense, moe)
    said = sentences(made)[0]
    assert said.startswith("One seed cannot tell. At equal training FLOPs")
    assert "score them on the same held-out text" in said
    assert tables(made)["Held-out loss at equal training FLOPs"].rows[0][2] == "one seed"

    def scored(name: str, run: Path, nats: list[float], units: str = "a", **more) -> Path:
        paired = {"units": "documents", "units_sha256": units, "top": nats, "bottom": [10.0] * len(nats)}
        metric = {"value": sum(nats) / (10 * len(nats)), "standard_error": 0.1, "higher_is_better": False}
        result = {"kind": "text", "name": "held.txt", "data": {"sha256": "x"}, "metrics": {"loss": metric}}
        return write_checkpoint(
            tmp_path / name, run, step=60 if run == dense else 40,
            eval={"format": 1, "results": [{**result, "paired": {"loss": paired}, **more}]},
        )  # fmt: skip

    ours, theirs = [20.0, 21.0, 19.0, 30.0], [22.0, 22.9, 21.1, 32.0]
    ends = [scored("moe-end", moe, ours), scored("dense-end", dense, theirs)]
    said = sentences(document(dense, moe, *ends))[0]
    assert said.startswith("One seed cannot tell. ")
    error = np.std(np.array(ours) - np.array(theirs), ddof=1) / 2 / 10
    assert (
        f"On the same 4 documents of held.txt it is ahead, by −0.2000 ± {error:.4f} loss (after 3.84e06 "
        f"FLOPs, the dense model after 3.84e06)"
    ) in said
    # A mean is compared with a mean alone.
    averaged(ends[0], [20, 40])
    assert "On the same" not in sentences(document(dense, moe, *ends))[0]
    averaged(ends[1], [30, 60])
    said = sentences(document(dense, moe, *ends))[0]
    assert "(mean of 2 of both, after 3.84e06 FLOPs" in said
    ends[0] = scored("moe-end-again", moe, ours)
    for name, more in {
        "other-units": {"units": "b"},
        "other-data": {"data": {"sha256": "y"}},
        "damaged": {"paired": {"loss": {"units_sha256": "a", "top": [1], "bottom": "x"}}},
        "no-list": {"paired": 5},
    }.items():
        other = scored(name, dense, theirs, **more)
        assert "On the same" not in sentences(document(dense, moe, ends[0], other))[0]


def test_images_are_compared_on_accuracy_too(tmp_path):
    task = {"task": {"name": "image_classification", "test": "test.parquet"}}

    def images(folder: Path, **changes) -> Path:
        made = write_run(folder, lambda t: 2.0, **changes, **task)
        about = json.loads((made / "run.json").read_text()) | {"task": "image_classification"}
        (made / "run.json").write_text(json.dumps(about))
        return made

    made = document(images(tmp_path / "a"), images(tmp_path / "b", moe={}))
    assert [p.name for p in pictures(made)][:4] == [
        "loss-tokens",
        "loss-flops",
        "accuracy-tokens",
        "accuracy-flops",
    ]
    ends = tables(made)["Where the runs ended"]
    assert "nats per image" in ends.note
    assert ends.rows[0][-1] == "14.00%"


def test_page_and_markdown_say_the_same(given_folders):
    """Every cell and sentence of the document is in both, and every picture."""
    made = document(*given_folders)
    page = render(made)
    text, files = render_markdown(made, "report")
    shown = re.sub(r"\\(.)", r"\1", text)
    from html import unescape

    plain = unescape(re.sub(r"<[^>]*>", "\n", page))
    for table in tables(made).values():
        for cell in itertools.chain(table.head, *table.rows):
            assert cell in shown
            assert cell in plain
    for sentence in sentences(made):
        assert sentence in shown
        assert sentence in plain
    assert [*files] == [f"figures/report-{p.name}.png" for p in pictures(made)]
    assert page.count("<svg ") == len(files)
    for path, data in files.items():
        assert f"]({path})" in text
        assert data.startswith(b"\x89PNG")


def test_what_files_say_is_text_and_nothing_else(tmp_path, given_folders):
    """A run, a source, a layer's stack and a task called like mark-up, and like Markdown."""
    nasty = '<img src=x onerror="alert(1)">|`*_[a](b)'
    write_run(tmp_path / "nasty", lambda t: 2.0, moe={}, source=f"/nowhere/{nasty.replace('/', '')}")
    run = tmp_path / "nasty" / "run.json"
    about = json.loads(run.read_text())
    about |= {"architecture": nasty, "upcycle_version": nasty}
    about["run"]["init"]["name"] = nasty
    run.write_text(json.dumps(about))
    metrics = tmp_path / "nasty" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('{"layer": 1,', '{"stack": "<b>$x$</b>", "layer": 1,'))
    evaluated = write_checkpoint(tmp_path / "end", eval=left_behind.scores(**{nasty: (0.5, None)}))
    report(
        [*given_folders, tmp_path / "nasty", evaluated], tmp_path / "r.html",
        markdown=tmp_path / "r.md", title="<script>alert(2)</script>",
    )  # fmt: skip
    page, text = (tmp_path / "r.html").read_text(), (tmp_path / "r.md").read_text()
    for mark in ("<img", "<script>alert", "<b>"):
        assert mark not in page
        assert mark not in text.replace("\\<", "")
    assert "&lt;img src=x" in page
    assert "&lt;script&gt;alert(2)" in page
    assert page.count("<script") == 1
    for table in text.split("\n\n"):
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(tmp_path, given_folders):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        report(given_folders, tmp_path / name / "r.html", markdown=tmp_path / name / "r.md")
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) > 8
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_page_names_no_address(tmp_path, given_folders):
    report(given_folders, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    addresses = {*re.findall(r"https?://[^\s\"'<>)]+", page)}
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not places
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len({*ids}) == len(ids)
    assert {*re.findall(r"url\(#([^)]*)\)", page), *re.findall(r'href="#([^"]*)"', page)} <= {*ids}


# --- bad input ---


def test_what_cannot_be_used_is_named_and_the_rest_is_shown(tmp_path, given_folders, capsys):
    junk = tmp_path / "junk"
    junk.mkdir()
    broken = write_run(tmp_path / "broken", lambda t: 2.0)
    (broken / "run.json").write_text("{")
    newer = write_run(tmp_path / "newer", lambda t: 2.0)
    (newer / "run.json").write_text(json.dumps(json.loads((newer / "run.json").read_text()) | {"format": 2}))
    mixed = write_run(tmp_path / "mixed", lambda t: 2.0)
    other = write_run(tmp_path / "other", lambda t: 2.0, train={"batch_tokens": 2 * BATCH})
    (mixed / "run.json").write_text((other / "run.json").read_text())
    damaged = write_run(tmp_path / "damaged", lambda t: 2.0)
    lines = (damaged / "metrics.jsonl").read_text().splitlines()
    (damaged / "metrics.jsonl").write_text("\n".join([*lines[:20], "{]", *lines[20:]]) + "\n")
    scored = write_checkpoint(tmp_path / "scored", eval={"format": 1, "results": [{"kind": "text"}]})
    (page := tmp_path / "page.html").write_text("<p>")
    folders = [*given_folders, junk, broken, newer, mixed, damaged, scored, tmp_path / "gone", page]
    cli.main(["report", *map(str, folders), "--out", str(tmp_path / "r.html")])
    said = capsys.readouterr().err
    for sentence in (
        "junk is left out: it has neither run.json",
        "broken is left out: ",
        "newer is left out: its run.json has format 2; this version reads 1",
        "mixed is left out: its metrics.jsonl is of another run than its run.json: step 1 says 64 tokens "
        "and not 128",
        "damaged: line 21 of its metrics.jsonl is damaged: it is not valid JSON (",
        "line 1 column 2 (char 1)); nothing after it is shown",
        "damaged is unfinished: 20 of 40 steps",
        "scored: eval.json is damaged",
        "gone is left out: there is no such folder",
        "page.html is left out: it is a file; give the folder of a run or of a checkpoint",
    ):
        assert sentence in said
        assert sentence in (tmp_path / "r.html").read_text()


def test_a_line_cut_off_by_a_kill_and_no_metrics_at_all(tmp_path):
    cut = write_run(tmp_path / "cut", lambda t: 2.0)
    (cut / "metrics.jsonl").write_bytes((cut / "metrics.jsonl").read_bytes()[:-40])
    empty = write_run(tmp_path / "empty", lambda t: 2.0)
    (empty / "metrics.jsonl").unlink()
    said = study([cut, empty], DenseCost()).troubles()
    assert "cut: line 40 of its metrics.jsonl was cut off, as a kill leaves it" in said
    assert "cut is unfinished: 39 of 40 steps; shown as far as it goes" in said
    assert "empty: it has no metrics.jsonl: no step was recorded" in said
    assert document(cut, empty).sections


def test_nothing_to_report_on_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(tmp_path / "gone"), "--out", str(tmp_path / "r.html")])
    assert stopped.value.code == 2
    assert "gone: there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def spoil_file(drawn: random.Random, path: Path, text: str) -> None:
    """One JSON document in a file of them, one a line."""
    lines = text.splitlines()
    place = drawn.randrange(len(lines))
    lines[place] = json.dumps(spoil(drawn, json.loads(lines[place])))
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_files_with_anything_in_them_never_end_in_a_traceback(tmp_path, seed, monkeypatch):
    monkeypatch.setattr("upcycle.reporting.checkpoints._anatomy", lambda folder: None)
    folders = whole_study(tmp_path)
    folders.append(write_run(tmp_path / "from-end", lambda t: 2.0, source=str(tmp_path / "moe-end0"), moe={}))
    files = [path for folder in folders for path in folder.iterdir() if path.name != "config.json"]
    drawn = random.Random(seed)
    for turn in range(50):
        path = drawn.choice(files)
        text = path.read_text()
        spoil_file(drawn, path, text)
        made = document(*folders)
        if turn % 10 == 0:
            render(made).encode()
            render_markdown(made, "r")[0].encode()
        path.write_text(text)
    assert len(study(folders, DenseCost()).runs) == 6


@pytest.mark.parametrize("stages", [5, None, {"a": 1}, [1], [{"train": {"steps": 1}, "data": 3}]])
def test_stages_that_are_no_tables_are_damage(tmp_path, stages):
    run, other = write_run(tmp_path / "damaged", lambda t: 2.0), write_run(tmp_path / "whole", lambda t: 2.0)
    about = json.loads((run / "run.json").read_text())
    about["run"]["stage"] = stages
    (run / "run.json").write_text(json.dumps(about))
    ((name, why),) = study([run, other], DenseCost()).refused
    assert name == "damaged"
    assert why.startswith("its run.json is damaged: run.stage")


def test_control_characters_and_halves_of_characters_are_shown_as_what_they_are(tmp_path, monkeypatch):
    """In labels, in figures, and in names of folders; the page and its figures stay readable XML."""
    monkeypatch.setattr("upcycle.reporting.checkpoints._anatomy", lambda folder: None)
    nasty = "a\x00b\x1b[31mc\ud800d\ufffee"
    dense, moe = pair_of_runs(tmp_path)
    about = json.loads((moe / "run.json").read_text())
    about["run"]["init"]["name"] = nasty
    (moe / "run.json").write_text(json.dumps(about))
    routing = json.loads(json.dumps(left_behind.ROUTING).replace("stories", nasty.replace("\x00", "\\u0000")
        .replace("\x1b", "\\u001b").replace("\ud800", "\\ud800").replace("\ufffe", "\\ufffe")))  # fmt: skip
    end = write_checkpoint(tmp_path / "end\x1b", moe, routing=routing)
    report([dense, moe, end], tmp_path / "r.html", markdown=tmp_path / "r.md", title=nasty)
    page, text = (tmp_path / "r.html").read_text(), (tmp_path / "r.md").read_text()
    for character in ("\x00", "\x1b", "\ufffe"):
        assert character not in page
        assert character not in text
    assert "a\ufffdb\ufffd[31mc\ufffdd\ufffde" in page
    for drawn in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawn)


@pytest.mark.slow
def test_nothing_is_overwritten_but_a_report(tmp_path):
    given = [*pair_of_runs(tmp_path / "given")]
    mine = tmp_path / "mine.html"
    mine.write_text("precious")
    with pytest.raises(
        UpcycleError, match="exists already and is not a file of a report; nothing is overwritten"
    ):
        report(given, mine)
    (tmp_path / "figures").mkdir()
    picture = tmp_path / "figures" / "r-loss-tokens.png"
    picture.write_bytes(b"precious")
    with pytest.raises(
        UpcycleError, match=r"r-loss-tokens\.png exists already and is not a file of a report"
    ):
        report(given, tmp_path / "r.html", markdown=tmp_path / "r.md")
    assert (mine.read_text(), picture.read_bytes()) == ("precious", b"precious")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures", "given", "mine.html"]
    picture.unlink()
    for title in ("first", "second"):  # a report takes the place of a report
        report(given, tmp_path / "r.html", markdown=tmp_path / "r.md", title=title)
        assert f"<h1>{title}</h1>" in (tmp_path / "r.html").read_text()
        assert f"# {title}" in (tmp_path / "r.md").read_text()
    assert not list(tmp_path.rglob("*.partial"))


def test_mistakes_in_what_is_asked(tmp_path, given_folders, monkeypatch):
    with pytest.raises(UpcycleError, match="--dense-flops = -1"):
        report(given_folders, tmp_path / "r.html", dense_flops=-1)
    with pytest.raises(UpcycleError, match="give them two names"):
        report(given_folders, tmp_path / "r.html", markdown=tmp_path / "r.html")
    with pytest.raises(UpcycleError, match="exists already and is not a file of a report"):
        report(given_folders, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UpcycleError, match=r'pip install "upcycle\[report\]"'):
        report(given_folders, tmp_path / "r.html")


# --- figures ---


def test_legends_and_texts_lie_beside_the_data_and_inside_the_figure(given_folders):
    for picture in pictures(document(*given_folders, given=DenseCost(flops=1e6))):
        with drawing._settings():
            figure = picture.draw(LIGHT)
            figure.draw_without_rendering()
        (axes, *_), whole = figure.axes, figure.bbox
        for legend in figure.legends:
            assert not legend.get_window_extent().overlaps(axes.get_window_extent()), picture.name
            assert legend.get_window_extent().x1 <= whole.x1 + 1
        for text in (axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label):
            if not text.get_text():
                continue
            box = text.get_window_extent()
            assert box.x0 >= -1
            assert box.x1 <= whole.x1 + 1, (picture.name, text.get_text())
            assert box.y1 <= whole.y1 + 1
        assert axes.get_xlabel()
        assert axes.get_ylabel() or picture.name.startswith("tasks")
        assert axes._left_title.get_text() == picture.title


def test_figures_leave_matplotlib_as_it_was(given_folders):
    import matplotlib

    before = dict(matplotlib.rcParams)
    drawing.svg(pictures(document(*given_folders))[0])
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_drawing_has_the_colours_of_its_page_and_no_others(given_folders):
    """But for heat maps, whose colours are the same on both."""
    for picture in pictures(document(*given_folders)):
        drawn = drawing.svg(picture)
        for stand_in in VARIABLES.named().values():
            assert stand_in not in drawn
        if not picture.name.startswith(("load", "routing")):
            assert {*re.findall(r"#[0-9a-f]{6}", drawn)} <= {"#000000"}
        assert "var(--ink)" in drawn
        assert 'role="img"' in drawn
        assert "<title " in drawn


def test_curves_are_drawn_where_the_numbers_are(tmp_path):
    made = document(*pair_of_runs(tmp_path))
    picture = next(p for p in pictures(made) if p.name == "loss-tokens")
    with drawing._settings():
        axes = picture.draw(LIGHT).axes[0]
    dense, moe = axes.lines[:2]
    assert dense.get_xydata().tolist() == [[t * BATCH / 1e3, 2.0] for t in range(0, 61, 10)]
    assert moe.get_ydata() == pytest.approx([2.1 - 1e-4 * BATCH * t for t in range(0, 41, 10)])
    assert axes.get_xlabel() == "tokens trained on (thousands)"
    circle = axes.lines[-1].get_xydata()
    assert circle.ravel() == pytest.approx([1.0, 2.0])  # thousand tokens, nats


def test_runs_from_scratch_do_not_hide_the_others(tmp_path):
    """What began from the dense model is shown once more by itself, with the same marks."""
    dense, moe = pair_of_runs(tmp_path)
    scratch = write_run(tmp_path / "scratch", lambda t: 9.0, from_scratch=True, moe={}, steps=400)
    made = {p.name: p for p in pictures(document(dense, moe, scratch))}
    assert {"loss-tokens-near", "loss-flops-near", "accuracy-flops-near"} <= {*made}
    with drawing._settings():
        whole, near = (made[name].draw(LIGHT).axes[0] for name in ("loss-flops", "loss-flops-near"))
    assert [len(axes.lines) for axes in (whole, near)] == [5, 4]  # a crossing is a line and a circle
    assert [line.get_xydata().tolist() for line in near.lines[:2]] == [
        line.get_xydata().tolist() for line in whole.lines[:2]
    ]
    assert near.get_ylim()[1] < 2.2 < whole.get_ylim()[1]
    assert "loss-flops-near" not in {p.name for p in pictures(document(dense, moe))}


def test_long_names_are_wrapped_and_no_two_of_twelve_series_look_alike():
    labels = [f"{i}, " + "a very long name of a model " * 2 for i in range(12)]
    x = np.arange(3.0)
    lines = [figures.Line(label=label, place=i, x=x, y=x + i) for i, label in enumerate(labels)]
    with drawing._settings():
        figure = figures.curves(LIGHT, "T", lines, figures.Axis(label="x"), figures.Axis(label="y"))
        figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= 0
    assert not box.overlaps(figure.axes[0].get_window_extent())
    assert figure.axes[0].get_window_extent().height > 0.5 * figures.HEIGHT * figure.dpi
    looks = {(line.get_color(), line.get_marker(), str(line._dash_pattern)) for line in figure.axes[0].lines}
    assert len(looks) == 12


@pytest.mark.parametrize("length", [12, 16, 17, 24, 42])
def test_legends_of_any_length_stay_inside(length):
    lines = [figures.Line(label="n" * length, place=i, x=np.arange(3.0), y=np.arange(3.0)) for i in range(4)]
    with drawing._settings():
        figure = figures.curves(LIGHT, "T", lines, figures.Axis(label="x"), figures.Axis(label="y"))
        figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize(("largest", "exponent"), [(0, 0), (999, 0), (1e3, 3), (9.9e14, 12), (1e15, 15)])
def test_axes_count_in_steps_of_a_thousand(largest, exponent):
    assert figures._exponent(largest) == exponent


# --- colours ---


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("inks", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_is_what_wcag_asks_for(inks: Inks):
    for paper in (inks.paper, inks.card):
        assert contrast(inks.ink, paper) > 7
        assert contrast(inks.faint, paper) > 4.5
        assert contrast(inks.link, paper) > 4.5
        for colour in inks.series:
            assert contrast(colour, paper) > 3
    assert contrast(inks.warning, inks.warning_paper) > 4.5
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


# Machado, Oliveira, Fernandes 2009, severity 1.0, on linear RGB.
SIGHT = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    ),
}


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Ottosson 2020."""
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("inks", [LIGHT, DARK], ids=["light", "dark"])
def test_series_are_told_apart_by_every_eye(inks: Inks, sight: str):
    """0.1 in Oklab is five times a difference that can just be seen."""
    seen = [oklab(SIGHT[sight] @ linear(colour)) for colour in inks.series]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.1


def test_both_papers_have_the_same_names():
    assert LIGHT.named().keys() == DARK.named().keys() == VARIABLES.named().keys()
    assert len({*VARIABLES.named().values()}) == len(VARIABLES.named())
    assert len(LIGHT.series) == len(DARK.series) == len(figures._MARKERS)
    assert {f.name for f in dataclasses.fields(Inks)} > {"paper", "card", "ink", "series"}


# --- real runs ---


@pytest.mark.slow
def test_a_report_on_real_runs(trainable, tmp_path):
    """A dense model and a Mixture of Experts made of it, trained by `upcycle train`, exported, and shown."""

    def run(name: str, **changes) -> Path:
        table = {
            "source": str(trainable[0]),
            "out": str(tmp_path / name),
            "data": {"sources": [{"path": str(trainable[1]), "separator": "<|endoftext|>"}], "held_out": 0.1},
            "train": {
                "steps": 4, "batch_tokens": 512, "sequence_length": 64, "eval_every": 2, "eval_tokens": 1024,
            },
            "schedule": {"peak": 1e-3, "warmup": 1},
            **changes,
        }  # fmt: skip
        loop.train(Run.of(table))
        return tmp_path / name

    first = run("first", from_scratch=True)
    export(first, tmp_path / "start")
    dense = run("dense", source=str(tmp_path / "start"))
    moe = run(
        "moe",
        source=str(tmp_path / "start"),
        moe={"num_experts": 4, "top_k": 2},
        init={"name": "drop", "ratio": 0.5},
    )
    export(moe, tmp_path / "end")
    found = study([first, dense, moe, tmp_path / "end"], DenseCost())
    assert found.troubles() == []
    assert [g.kind for g in found.groups] == ["dense, continued", "dense, from scratch", "upcycled"]
    record = json.loads((moe / "run.json").read_text())
    upcycled = group(found.comparison, "upcycled")
    assert upcycled.flops[-1] == 4 * 512 / 64 * record["training_flops_per_row"]
    assert upcycled.start.flops == pytest.approx(group(found.comparison, "dense, from scratch").flops[-1])
    assert upcycled.loss.value.tolist() == [
        metrics.read(moe)[0].held_out_start, *(metrics.read(moe)[i].held_out_loss for i in (1, 3))
    ]  # fmt: skip
    (column,) = found.columns()
    assert column.label == upcycled.label
    report([first, dense, moe, tmp_path / "end"], tmp_path / "r.html", markdown=tmp_path / "r.md")
    made = tables(sections.document(found, "R"))
    assert len(made["Cosine similarity of experts"].rows) == 5
    for row in made["Cosine similarity of experts"].rows:
        assert 0.2 < float(row[4]) < 0.9  # half of the neurons of each were drawn anew
    assert "not recorded" not in {row[7] for row in made["Speed of training"].rows}
    assert len(list((tmp_path / "figures").glob("r-*.png"))) == len(pictures(sections.document(found, "R")))


def test_a_grown_run_is_labelled_by_the_experts_that_it_has(trainable, tmp_path):
    """Its run file says how many are added, and the source how many there are."""
    convert(trainable[0], tmp_path / "moe", Recipe.of(moe={"num_experts": 4, "top_k": 2}))
    table = {
        "source": str(tmp_path / "moe"),
        "out": str(tmp_path / "run"),
        "grow": {"experts": 12},
        "schedule": {"peak": 1e-3},
        "data": {"sources": [{"path": str(trainable[1]), "separator": "<|endoftext|>"}], "held_out": 0.1},
        "train": {
            "steps": 1, "batch_tokens": 64, "sequence_length": 64, "eval_every": 1, "eval_tokens": 64,
        },
    }  # fmt: skip
    loop.train(Run.of(table))
    export(tmp_path / "run", tmp_path / "out")
    found = study([tmp_path / "run", tmp_path / "out"], DenseCost())
    (column,) = found.columns()
    assert [each.label for each in (*found.groups, column)] == ["12 experts, top-6, grown"] * 2
    ((_, _, _, recipe, *_),) = tables(sections.document(found, "R"))["Checkpoints"].rows
    assert recipe == "12 experts, top-6, grown"
    again = json.loads((tmp_path / "run" / "run.json").read_text())
    assert again["run"]["moe"]["num_experts"] == 8  # as the run file has it, which is what a resume compares


def test_reading_needs_no_torch(tmp_path):
    import subprocess

    run = write_run(tmp_path / "run", lambda t: 2.0, moe={})
    script = (
        "import sys\nfrom pathlib import Path\nfrom upcycle.reporting import report\n"
        f"report([{str(run)!r}], {str(tmp_path / 'r.html')!r})\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib.pyplot') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_compare_takes_nothing():
    assert compare([], DenseCost()).groups == ()
