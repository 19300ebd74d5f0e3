"""The machinery of experiments: what is recorded, what is exported, and what is shown of partial results.

Nothing is trained; runs are made up.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import scripts
from upcycle.records.state import RunState
from upcycle.reporting import inks

SOON = 20.0  # seconds after which a test that waits has failed


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    """The modules that experiments share."""
    with scripts.loaded("language") as language, scripts.loaded("code/figures"):
        names = ("common", "continuation", "figure", "outcome", "results_file")
        yield SimpleNamespace(language=language, **{name: sys.modules[name] for name in names})


@pytest.fixture
def results(modules, tmp_path):
    return modules.results_file.ResultsFile(
        path=tmp_path / "results.json", named_by=("variant", "seed"), order=lambda key: key
    )


def variants_in(path: Path) -> list[str]:
    return [run["variant"] for run in json.loads(path.read_text())["runs"]] if path.exists() else []


def wait_until(reached: Callable[[], bool]) -> None:
    until = time.monotonic() + SOON
    while not reached():
        assert time.monotonic() < until
        time.sleep(0.005)


def in_threads(*calls: Callable[[], object]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)


def result(variant: str, seed: int = 0) -> dict[str, Any]:
    return {"variant": variant, "seed": seed}


def test_two_gatherings_of_one_experiment_keep_the_results_of_both(modules, tmp_path):
    """Both read the file before either one writes."""
    both = threading.Barrier(2)

    class Experiment(modules.continuation.Continuation):
        def go(self, folder: Path, start: int, variant: str, seed: int) -> dict[str, Any]:
            both.wait(SOON)
            return {"start": start, "variant": variant, "seed": seed, "curve": [[0, 0, 0, 0, 1.0]] * 2}

    path = tmp_path / "results.json"
    experiment = Experiment(start=None, variants={}, core=[], results=path, default=1)
    in_threads(*(lambda v=v: experiment.gather(tmp_path, [(1, v, 0)], 1) for v in "ba"))
    assert variants_in(path) == ["a", "b"]
    assert json.loads(path.read_text())["versions"].keys() == {"torch", "transformers", "upcycle"}


def test_results_by_variant_and_seed_are_kept_as_well(modules, tmp_path):
    both, path = threading.Barrier(2), tmp_path / "results.json"

    def go(variant: str, seed: int) -> dict[str, Any]:
        both.wait(SOON)
        return result(variant, seed)

    def gather(variant: str) -> None:
        modules.common.gather(path, [(variant, 0)], go, ["b", "a"], 1, {"steps": 8})

    in_threads(lambda: gather("a"), lambda: gather("b"))
    assert variants_in(path) == ["b", "a"]  # in the order of the variants
    assert json.loads(path.read_text())["steps"] == 8


def test_a_result_waits_while_another_process_writes(results):
    with results.path.with_name(".results.json.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=results.add, args=({}, result("ours")))
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        results.path.write_text(json.dumps({"runs": [result("theirs")]}))
    thread.join(SOON)
    assert variants_in(results.path) == ["ours", "theirs"]


def test_a_result_is_recorded_when_it_ends_even_if_an_earlier_job_fails_later(results):
    def go(variant: str, seed: int) -> dict[str, Any]:
        if variant == "good":
            return result(variant, seed)
        wait_until(lambda: variants_in(results.path) == ["good"])  # while this job still runs
        raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        results.gather([("bad", 0), ("good", 0)], go, 2, {})
    assert variants_in(results.path) == ["good"]


def test_a_recorded_job_is_not_repeated(results):
    results.add({}, result("a"))
    results.gather([("a", 0), ("b", 0)], lambda variant, seed: {"a": None, "b": result("b")}[variant], 1, {})
    assert variants_in(results.path) == ["a", "b"]


def test_the_file_of_results_is_replaced_and_never_half_written(results):
    results.add({}, result("a"))
    before = results.path.read_text()
    with results.path.open() as opened:
        results.add({}, result("b"))
        assert opened.read() == before  # writing in place would have changed it
    with pytest.raises(TypeError):
        results.add({}, result("c") | {"loss": object()})
    assert variants_in(results.path) == ["a", "b"]


KEEP = 4


class Dense:
    """A dense model that takes no time to train: it leaves checkpoints each 10 steps, and keeps the last."""

    def __init__(self, modules: SimpleNamespace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "shape").mkdir()
        self.out, self.stop = folder / "run", 0  # the step at which it is stopped
        self.trained: list[int] = []
        table = {"source": str(folder / "shape"), "out": str(self.out), "train": {"steps": 40}}
        self.start = modules.continuation.Start(
            table=lambda _: table, model=lambda: None, steps={1: 10, 2: 20, 4: 40}
        )
        monkeypatch.setattr(modules.common, "train", self.train)
        monkeypatch.setattr(modules.common, "upcycle", self.export)

    @property
    def steps(self) -> list[int]:
        return sorted(int(each.name[5:]) for each in (self.out / "checkpoints").glob("step-*"))

    def train(self, table: dict[str, Any], threads: int) -> None:
        last, begun = table["train"]["steps"], max(self.steps, default=0)
        self.trained.append(last)
        assert last >= begun, "a run is not resumed to fewer steps than it has taken"
        for step in range(begun + 1, last + 1):
            stopped = step == self.stop
            if step % 10 == 0 or step == last or stopped:
                self.save(step)
            if stopped:
                self.stop = 0
                raise InterruptedError

    def save(self, step: int) -> None:
        (self.out / "checkpoints" / f"step-{step}").mkdir(parents=True)
        (self.out / "checkpoints" / f"step-{step}" / RunState.FILE).write_text("{}")
        for old in self.steps[:-KEEP]:
            self.remove(old)

    def remove(self, step: int) -> None:
        (self.out / "checkpoints" / f"step-{step}" / RunState.FILE).unlink()
        (self.out / "checkpoints" / f"step-{step}").rmdir()

    def export(self, name: str, run: str, out: str, *options: str) -> None:
        assert (name, run, options[0]) == ("export", str(self.out), "--step")
        assert int(options[1]) in self.steps
        Path(out).mkdir()


@pytest.fixture
def dense(modules, tmp_path, monkeypatch):
    return Dense(modules, tmp_path, monkeypatch)


def exported(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.glob("dense-*"))


def test_a_start_is_exported_when_it_is_reached(dense, tmp_path):
    """The training is stopped after the first start, and goes on."""
    dense.stop = 17
    with pytest.raises(InterruptedError):
        dense.start.train(tmp_path, 4)
    assert exported(tmp_path) == ["dense-1"]
    dense.start.train(tmp_path, 4)
    assert exported(tmp_path) == ["dense-1", "dense-2", "dense-4"]
    assert dense.trained == [10, 20, 20, 40]


def test_a_stop_costs_no_start_its_checkpoint(dense, tmp_path):
    """With the checkpoint of a stop there is one more than are kept, and the first start's is removed."""
    dense.stop = 33
    with pytest.raises(InterruptedError):
        dense.start.train(tmp_path, 4)
    dense.start.train(tmp_path, 4)
    assert 10 not in dense.steps
    assert exported(tmp_path) == ["dense-1", "dense-2", "dense-4"]


def test_a_training_goes_on_to_a_later_start(dense, tmp_path):
    dense.start.train(tmp_path, 2)
    assert (exported(tmp_path), dense.steps) == (["dense-1", "dense-2"], [10, 20])
    dense.start.train(tmp_path, 2)  # there is nothing left to do
    dense.start.train(tmp_path, 4)
    assert dense.trained == [10, 20, 40]


def test_starts_of_a_longer_run_are_exported_without_training(dense, tmp_path):
    for step in (10, 20, 30):
        dense.save(step)
    dense.start.train(tmp_path, 2)
    assert (exported(tmp_path), dense.trained) == (["dense-1", "dense-2"], [])


def test_a_start_that_was_passed_without_a_checkpoint_is_a_failure(dense, tmp_path):
    for step in (20, 30):
        dense.save(step)
    with pytest.raises(SystemExit, match=r"dense-1 is not there, and .*run is past step 10 and has no check"):
        dense.start.train(tmp_path, 4)
    (tmp_path / "dense-1").mkdir()  # the start was exported, and its checkpoint is not needed
    dense.start.train(tmp_path, 4)
    assert exported(tmp_path) == ["dense-1", "dense-2", "dense-4"]


def curve(seed: int, first: float, last: float) -> dict[str, Any]:
    return {"seed": seed, "curve": [[0, 0, 0, 0.0, first], [5, 9, 50, 1.0, 3.0], [10, 9, 100, 2.0, last]]}


@pytest.fixture
def outcome(modules, tmp_path) -> Callable[..., Any]:
    """An outcome of runs from the starts 8 and 9, which took 100 steps each."""
    experiment = modules.continuation.Continuation(
        start=SimpleNamespace(steps={8: 100, 9: 100}),
        variants={"dense": {}, "copy": {}, "drop": {}, "wide": {}, "flat": {}},
        core=["dense", "copy", "drop"],
        questions={"the width": ["dense", "wide"], "the depth": ["copy", "flat"]},
        results=tmp_path / "results.json",
        default=8,
    )
    return lambda **runs: modules.outcome.Outcome(
        experiment, {(int(key[-1]), key[:-2]): each for key, each in runs.items()}
    )


@pytest.fixture
def drawn(modules, monkeypatch) -> dict[str, Any]:
    """The curves of each figure, by the name of its file; nothing is drawn."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(
        modules.figure, "write", lambda path, title, curves, x, y, **_: found.update({path.name: curves})
    )
    return found


DENSE = [curve(0, 2.5, 2.4), curve(1, 2.5, 2.3)]


def test_runs_without_a_dense_run_are_left_out_and_named(outcome, drawn, capsys):
    found = outcome(
        dense_8=DENSE, copy_8=[curve(1, 2.6, 2.2)], drop_8=[curve(2, 2.6, 2.2)], copy_9=[curve(0, 2.6, 2.2)]
    )
    assert (found.starts, len(found.table())) == ([8], 4)
    found.report("units", "nats")
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == found.table()
    assert said[4:] == [
        "From start 8, drop is left out: none of its seeds has a dense run.",
        "From start 9, copy is left out: there is no dense run.",
    ]
    assert {name: [*curves] for name, curves in drawn.items()} == {"start-8.png": ["dense", "copy"]}


def test_a_question_has_a_figure_from_the_starts_of_its_own_variants(outcome, drawn):
    """`flat` has not run, and `wide` from one start alone."""
    found = outcome(dense_8=DENSE, copy_8=[curve(1, 2.6, 2.2)], wide_8=[curve(1, 2.6, 2.3)], dense_9=DENSE)
    found.report("units", "nats")
    assert {name: [*curves] for name, curves in drawn.items()} == {
        "start-8.png": ["dense", "copy"], "the-width-8.png": ["dense", "wide"], "start-9.png": ["dense"],
    }  # fmt: skip


def test_nothing_is_said_if_every_run_is_compared(outcome, drawn, capsys):
    found = outcome(dense_8=DENSE, copy_8=[curve(1, 2.6, 2.2)])
    found.report("units", "nats")
    assert capsys.readouterr().out.splitlines() == found.table()


def test_no_results_at_all_are_an_empty_table(outcome, drawn):
    outcome().report("units", "nats")
    assert drawn == {}


@pytest.mark.parametrize(("highest", "points"), [(2.6, 3), (2.5, 2)])
def test_a_first_point_is_left_out_by_the_mean_of_the_seeds(outcome, drawn, tmp_path, highest, points):
    """Of the seeds, 2.4 lies below both limits and 2.7 above; their mean is 2.55."""
    found = outcome(dense_8=DENSE, copy_8=[curve(0, 2.4, 2.2), curve(1, 2.7, 2.2)])
    found.draw(tmp_path / "figure.png", 8, ["dense", "copy"], "title", "loss", highest)
    copy = drawn["figure.png"]["copy"]
    assert [len(seed) for seed in copy] == [points, points]
    assert copy[0][-1] == (10.0, 2.2)  # 10 of the 100 steps of the start, in percent
    assert [len(seed) for seed in drawn["figure.png"]["dense"]] == [
        len(DENSE[0]["curve"]) - (highest == 2.5)
    ] * 2


def test_the_error_of_one_seed_is_unknown(modules, outcome):
    assert modules.common.mean_and_error([2.0]) == (2.0, None)
    assert modules.common.mean_and_error([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5 / 3**0.5))
    found = outcome(dense_8=DENSE, copy_8=[curve(1, 2.6, 2.2)], drop_8=[curve(1, 2.6, 2.2), curve(2, 2, 2.4)])
    *_, dense, copy, drop = found.table()
    assert dense == "| 8 | dense | 2 | 2.500 | 2.3500 ± 0.0500 |  |  |  |  |"
    assert copy == "| 8 | copy | 1 | 2.600 | 2.2000 | -0.1000 | 0% | 5.0% | 10% |"
    assert drop.startswith("| 8 | drop | 2 | 2.300 | 2.3000 ± 0.1000 | -0.1000 |")  # one seed in common


def course(seed: int, *losses: float, flops: float = 10) -> dict[str, Any]:
    """A run of so many evaluations, evenly over its FLOPs."""
    points = [[step, 0, step * flops / (len(losses) - 1), 0.0, loss] for step, loss in enumerate(losses)]
    return {"seed": seed, "curve": points}


def test_ahead_and_behind_are_beyond_two_standard_errors_of_pairs(outcome):
    """The seeds are far apart, and the gaps of each to the dense run of its seed are not."""
    found = outcome(
        dense_8=[course(0, 3.0, 2.8, 2.6, 2.4), course(1, 4.0, 3.8, 3.6, 3.4)],
        copy_8=[course(0, 3.2, 2.8, 2.5, 2.3), course(1, 4.2, 3.6, 3.5, 3.3)],
        drop_8=[course(0, 3.0, 2.8, 2.6, 2.3), course(1, 4.0, 3.8, 3.6, 3.4)],
    )
    spent = found.spent(8)
    ends = [step * 10 / 3 / spent for step in range(4)]
    x, gap, errors = found.course(8, "copy").T
    assert x == pytest.approx(ends)
    assert gap == pytest.approx([0.2, -0.1, -0.1, -0.1])
    assert errors == pytest.approx([0.0, 0.2, 0.0, 0.0], abs=1e-12)
    assert (found.behind(8, "copy"), found.ahead(8, "copy")) == (0.0, pytest.approx(ends[2]))
    assert (found.behind(8, "drop"), found.ahead(8, "drop")) == (None, None)  # -0.05, with 0.1


def test_a_crossing_is_that_of_each_seed_and_has_an_error(outcome):
    """The gaps of the two seeds fall in a straight line from 0.3 and 0.1 to -0.1."""
    found = outcome(
        dense_8=[course(0, 3.0, 2.8, 2.6), course(1, 4.0, 3.8, 3.6)],
        copy_8=[course(0, 3.3, 2.9, 2.5), course(1, 4.1, 3.8, 3.5)],
    )
    whole = 10 / found.spent(8)
    assert found.crossings(8, "copy") == pytest.approx([0.75 * whole, 0.5 * whole])
    mean, error = found.crosses(8, "copy")
    assert (mean, error) == (pytest.approx(0.625 * whole), pytest.approx(0.125 * whole))
    assert f"| {100 * mean:.1f} ± {100 * error:.1f}% |" in found.table()[-1]


def test_a_seed_that_crosses_twice_counts_where_it_crosses_for_good(outcome):
    found = outcome(dense_8=[course(0, 3.0, 3.0, 3.0, 3.0)], copy_8=[course(0, 3.1, 2.9, 3.1, 2.9)])
    assert found.crossings(8, "copy") == pytest.approx([2.5 / 3 * 10 / found.spent(8)])


@pytest.mark.parametrize(
    ("ends", "cell"), [((2.9, 3.1), "not yet"), ((2.9, 3.0), "not yet"), ((2.9, 2.9), "-")]
)
def test_what_has_not_crossed_and_what_was_never_behind_have_no_number(outcome, ends, cell):
    found = outcome(
        dense_8=[course(0, 3.0, 3.0), course(1, 3.0, 3.0)],
        copy_8=[course(seed, 3.0, end) for seed, end in enumerate(ends)],
    )
    assert found.table()[-1].split(" | ")[7] == cell


def test_crossings_are_drawn_from_the_starts_where_all_seeds_cross(modules, outcome, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(modules.figure, "write_points", lambda path, title, points, *_: drawn.update(points))
    dense, crossing = [course(0, 3.0, 3.0)], [course(0, 3.1, 2.9)]
    found = outcome(dense_8=dense, dense_9=dense, copy_8=crossing, copy_9=crossing, drop_8=crossing,
                    drop_9=[course(0, 3.1, 3.1)])  # fmt: skip
    found.draw_crossings(tmp_path / "crossing.png", "title", "x", "y")
    assert drawn == {"copy": [(start, pytest.approx(500 / found.spent(start)), None) for start in (8, 9)]}


def test_points_have_bars_of_one_standard_error(modules, tmp_path, monkeypatch):
    """The error of one seed is unknown: a point without a bar."""
    made = []
    monkeypatch.setattr(
        modules.figure.drawing, "png", lambda picture: made.append(picture.draw(inks.LIGHT)) or b""
    )
    points = {"one": [(40, 9.0, 2.0), (80, 5.0, None)]}
    modules.figure.write_points(tmp_path / "figure.png", "title", points, "x", "y", {"one": 3})
    (axes,) = made[0].axes
    (_, _, (bars,)) = axes.containers[0]
    assert [[y for _, y in bar] for bar in bars.get_segments()] == [[7.0, 11.0], [5.0, 5.0]]
    assert axes.get_lines()[0].get_color() == inks.LIGHT.series[3]
    assert (axes.get_xscale(), [*axes.get_xticks()]) == ("log", [40, 80])


def test_costs_are_counted_in_tokens_flops_and_measured_seconds(modules, outcome, tmp_path, monkeypatch):
    """A step of copies costs twice the FLOPs and 1.5 times the seconds; those of `drop` are not measured."""
    drawn = {}
    monkeypatch.setattr(modules.figure, "write_panels", lambda path, title, panels, *_: drawn.update(panels))
    found = outcome(
        dense_8=[course(0, 3.0, 2.8)], copy_8=[course(0, 3.0, 2.7, flops=20)], drop_8=[course(0, 3.0, 2.6)]
    )
    found.draw_costs(tmp_path / "costs.png", 8, "From 8", "loss", {"dense": 1.0, "copy": 1.5})
    (_, tokens), (_, flops), (label, seconds) = drawn.values()
    assert [*drawn] == ["From 8, in tokens", "From 8, in FLOPs", "From 8, in seconds"]
    ends = [{name: seeds[0][-1][0] for name, seeds in each.items()} for each in (tokens, flops, seconds)]
    assert ends == [
        {"dense": 1.0, "copy": 1.0, "drop": 1.0},  # one step, of the 100 of the start
        {"dense": 1.0, "copy": 2.0, "drop": 1.0},
        {"dense": 1.0, "copy": 1.5},
    ]
    assert " ".join(label.split()).endswith("dense = 1: copy 1.50; not measured: drop")


def test_panels_share_an_axis_and_a_legend(modules, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        modules.figure.drawing, "png", lambda picture: made.append(picture.draw(inks.LIGHT)) or b""
    )
    line = [[(0, 3.0), (1, 2.0)]]
    panels = {"first": ("a", {"one_1": line, "two": line}), "second": ("b", {"two": line})}
    modules.figure.write_panels(tmp_path / "figure.png", "title", panels, "y", {"one_1": 0, "two": 4})
    first, second = made[0].axes
    assert first.get_ylim() == second.get_ylim()
    assert [text.get_text() for text in made[0].legends[0].get_texts()] == ["one 1", "two"]
    assert second.get_lines()[0].get_color() == inks.LIGHT.series[4]


def test_a_run_that_ends_after_dense_continuation_is_not_ahead(outcome):
    dense = [course(0, 3.0, 2.8, 2.6, 2.4)]
    found = outcome(dense_8=dense, copy_8=[course(0, 3.0, 2.7, 2.5, 2.3, flops=12)], drop_8=[course(0, 3, 2)])
    assert found.ahead(8, "copy") is None
    assert found.ahead(8, "drop") == pytest.approx(10 / found.spent(8))


def test_what_is_from_scratch_counts_from_the_flops_of_the_start(outcome, monkeypatch):
    """Before, it cannot be ahead: dense continuation has not begun."""
    found = outcome(dense_8=[course(0, 3.0, 2.8, 2.6, 2.4)], drop_8=[course(0, 9.0, 2.9, 2.5, 2.0, flops=0)])
    spent = found.spent(8)
    (run,) = found.recorded[8, "drop"]
    for point, share in zip(run["curve"], (0.0, 0.9, 1.0, 1 + 10 / spent), strict=True):
        point[2] = share * spent
    monkeypatch.setattr(type(found.experiment), "from_scratch", lambda self, variant: variant == "drop")
    assert found.course(8, "drop")[:, 0] == pytest.approx([0.0, 10 / spent])
    assert found.ahead(8, "drop") == 0.0


def test_a_study_shows_no_error_of_one_seed(modules):
    points = [[0, 0, 3.0], [8, 10, 2.0]]
    study = SimpleNamespace(variants={"one": {}, "two": {}}, rival=None)
    runs = [
        {"variant": variant, "seed": seed, "curve": points, "left_behind": []}
        for variant, seed in (("one", 0), ("two", 0), ("two", 1))
    ]
    _, *lines = modules.language.rows(study, runs, 10)
    assert [line.split()[3:] for line in lines] == [
        ["3.0000"],
        ["2.0000"],
        ["3.0000", "0.0000"],
        ["2.0000", "0.0000"],
    ]


def test_a_curve_of_one_seed_has_no_band(modules, monkeypatch, tmp_path):
    lines = {}

    def png(picture: Any) -> bytes:
        lines.update({line.label: line for line in picture.draw.keywords["lines"]})
        return b""

    monkeypatch.setattr(modules.figure.drawing, "png", png)
    curves = {"one": [[(0, 3.0), (1, 2.0)]], "two": [[(0, 3.0), (1, 2.0)], [(0, 5.0), (1, 2.0)]]}
    modules.figure.write(tmp_path / "figure.png", "title", curves, "x", "y")
    assert (lines["one"].low, lines["one"].high) == (None, None)
    assert [*lines["two"].low] == [3.0, 2.0]
    assert [*lines["two"].high] == [5.0, 2.0]


@pytest.mark.parametrize(
    ("name", "figures"), [("moe_jetpack", ["cifar10.png", "fashion_mnist.png"]), ("donors", ["figure.png"])]
)
def test_what_is_recorded_is_drawn_without_the_data(name, figures, tmp_path, monkeypatch):
    """Nothing is trained, and the results stay as they are."""
    with scripts.loaded(name) as script:
        results = tmp_path / "results.json"
        shutil.copyfile(script.HERE / "results.json", results)
        recorded = results.read_text()
        monkeypatch.setattr(script, "HERE", tmp_path)
        monkeypatch.setattr(script.common, "train", None)
        monkeypatch.setattr(sys, "argv", [name, "--runs", str(tmp_path / "runs")])
        script.main()
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".png") == figures
    assert results.read_text() == recorded
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("moe_jetpack", "1 runs are missing: give --images to train them"),
        ("donors", "1 results are missing: give --checkpoint and --texts to make them"),
    ],
)
def test_what_is_missing_is_asked_for(name, said, tmp_path, monkeypatch):
    with scripts.loaded(name) as script:
        found = json.loads((script.HERE / "results.json").read_text())
        (tmp_path / "results.json").write_text(json.dumps(found | {"runs": found["runs"][1:]}))
        monkeypatch.setattr(script, "HERE", tmp_path)
        monkeypatch.setattr(sys, "argv", [name])
        with pytest.raises(SystemExit, match=said):
            script.main()
