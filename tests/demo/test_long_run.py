"""The curves that the package brings are those of the experiment, and a person sees them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import scripts
from upcycle.cli.views.demo import show_continued
from upcycle.demo import story
from upcycle.demo.long_run import FILE, long_run, section
from upcycle.demo.story import Continued
from upcycle.reporting import drawing

RESULTS = scripts.EXPERIMENTS / "code" / "results.json"
WAYS = {"dense": "dense", "granular": "shuffle_slice", "copy": "copy"}


def test_the_curves_are_what_the_script_makes_of_the_results():
    with scripts.loaded("code/long_run") as loaded:
        assert json.loads(FILE.read_text()) == loaded.found()


@pytest.mark.parametrize("name", ["dense", *story.WAYS])
def test_the_ends_are_those_in_the_results(name):
    """Read from the file itself: the mean loss of the seeds at the last point."""
    runs = json.loads(RESULTS.read_text())["runs"]
    ends = [r["curve"][-1][4] for r in runs if (r["start"], r["variant"]) == (320, WAYS[name])]
    run = long_run()
    assert len(ends) == run.seeds
    assert run.losses[name][-1] == pytest.approx(sum(ends) / len(ends), abs=1e-4)
    assert len(run.losses[name]) == len(run.extra)


def test_the_ways_are_those_of_the_demo():
    """What `shuffle_slice` and `copy` are in the experiment, `granular` and `copy` are in the demo."""
    with scripts.loaded("code") as loaded:
        for name, way in story.WAYS.items():
            ours = loaded.EXPERIMENT.variants[WAYS[name]]
            assert ours["moe"] == way["moe"]
            assert ours.get("init", {"name": "copy"}) == way.get("init", {"name": "copy"})


def test_the_demo_ends_with_them(capsys):
    spent = 0.02 * long_run().start_flops
    rows = [
        Continued(name=name, tokens=10, flops=spent, before=2.7, after=2.4 + 0.01 * place)
        for place, name in enumerate(["dense", *story.WAYS])
    ]
    show_continued(rows, Path("report.html"))
    said = capsys.readouterr().out
    assert "upcycling lost 0.010 (one seed)" in said
    assert "That was 2 % of what the dense model's own training cost." in said
    lines = [line.split() for line in said.splitlines()]
    assert ["30", "%", *(f"{losses[-1]:.4f}" for losses in long_run().losses.values())] in lines
    assert "granular 0.105 nats ahead, copy 0.059 nats ahead" in said
    assert "docs/" not in said  # a package has none


def test_the_report_has_them_as_a_figure():
    (picture,) = [block for block in section().blocks if hasattr(block, "draw")]
    assert drawing.png(picture).startswith(b"\x89PNG")
