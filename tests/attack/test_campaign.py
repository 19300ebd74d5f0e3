"""A campaign that goes on where the last one stopped, and a target whose process dies."""

from __future__ import annotations

import json
import os
from pathlib import Path

import campaign
import pytest
import trial
from tally import Row, Tally, table


def target() -> trial.Target:
    def run(data: bytes) -> None:
        if data == b"die":
            os._exit(9)
        if data == b"crash":
            raise KeyError("crash")

    def mutate(draw, raw: bytes) -> bytes:
        return raw

    return trial.Target("t", mutate, [trial.Start(word, run) for word in WORDS])


WORDS = [b"whole"] * 59 + [b"crash"]


def attacked(tally: Tally, goal: int) -> bool:
    return campaign.damaged(tally.row("t"), target, goal, 60, tally)


def test_a_campaign_goes_on_after_its_last_case(tmp_path: Path) -> None:
    """Two runs count what one would have: no case twice, and none left out."""
    path = tmp_path / "attack.json"
    for goal in (70, 130):
        assert attacked(Tally(path), goal)
    whole = Tally()
    assert attacked(whole, 130)
    row, once = Tally(path).row("t"), whole.row("t")
    assert (row.cases, row.accepted, row.refused, row.crashes) == (130, 128, 0, 2)
    assert (once.cases, once.accepted, once.refused, once.crashes) == (130, 128, 0, 2)
    assert "case 59: KeyError" in row.said[0]
    assert not list(tmp_path.glob("*.partial"))
    assert "| all | 130 | 128 | 0 | 2 |" in table([row])


def test_a_process_that_dies_is_a_crash_and_its_cases_are_not_tried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_campaign.WORDS", [b"whole"] * 59 + [b"die"])
    tally = Tally(tmp_path / "attack.json")
    assert not attacked(tally, 110)
    row = Tally(tmp_path / "attack.json").row("t")
    assert (row.cases, row.crashes, row.lost, row.next) == (50, 1, 50, 100)
    assert "ended with 9 after case 50" in row.said[0]
    assert attacked(tally, 110)
    assert (tally.row("t").cases, tally.row("t").next) == (60, 110)


def test_the_counts_of_an_older_campaign_are_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "attack.json"
    old = vars(Row("recipe", 278, 54, 224)) | {"said": []}
    del old["lost"]
    path.write_text(json.dumps([old]))
    assert Tally(path).row("recipe").next == 278
