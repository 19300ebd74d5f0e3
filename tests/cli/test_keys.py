"""The page of all keys is what the code says, and says something about each."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from upcycle import cli
from upcycle.cli import keys
from upcycle.nn import routers


def test_every_key_has_a_sentence():
    for section, listed in keys.everything().items():
        for key in listed:
            assert key.sentence, (section, key.name)
            assert key.takes


def test_the_page_is_what_the_code_says():
    page = Path(__file__).parents[2] / "docs" / "keys.md"
    assert page.read_text() == keys.markdown(), "make it anew: upcycle keys --markdown > docs/keys.md"


def test_the_page_on_encoders_has_every_router_with_its_keys():
    """`preset` of `spherical` and the like; `group` is for all."""
    page = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text()
    lines = page.partition("## Routers")[2].partition("\n## ")[0].splitlines()
    rows = [line.split("|")[1:] for line in lines if line.startswith("| `")]
    found = {row[0].strip(" `"): set(re.findall(r"`(\w+)`", row[2])) for row in rows}
    assert found == {
        name: {field.name for field in dataclasses.fields(kind)} - {*kind.common, "group"}
        for name in routers.names()
        if (kind := routers.find(name))
    }


def test_every_section_that_is_read_is_listed():
    """Every key that the default recipe and a run have stands in the page."""
    from upcycle.training.run import Run

    run = Run.of(
        {
            "source": "a",
            "out": "b",
            "moe": {},
            "data": {"sources": [{"path": "t.txt"}]},
            "train": {"steps": 1},
            "schedule": {"peak": 1e-3},
            "task": {"name": "image_classification"},
            "successor": {"hidden_size": 8},
        }
    )
    known = {key.name for listed in keys.everything().values() for key in listed}
    for section, value in run.as_table().items():
        for key in value if isinstance(value, dict) else [section]:
            assert key in known | {"name", "sources"}, (section, key)


def test_the_command(capsys):
    cli.main(["keys", "--json"])
    found = json.loads(capsys.readouterr().out)
    (top_k,) = [key for key in found["[moe]"] if key["name"] == "top_k"]
    assert top_k["default"] == "2"
    (capacity,) = [k for k in found['[router] name = "top_k"'] if k["name"] == "capacity_factor"]
    assert "num_experts: capacity for all tokens" in capacity["sentence"]
    cli.main(["keys"])
    assert "resized_crop" in capsys.readouterr().out
