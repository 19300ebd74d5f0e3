"""The lists in docs/convert.md are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

from upcycle import init
from upcycle.nn import router_starts, routers
from upcycle.targets import natives

PAGE = (Path(__file__).parents[2] / "docs" / "convert.md").read_text()


def test_every_initialisation_is_in_the_table():
    table = PAGE.partition("## Initialisations")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == init.names()


def test_the_recipe_names_every_router_and_every_start():
    (section,) = re.findall(r"^\[router\]\n(.*?)^std = ", PAGE, re.MULTILINE | re.DOTALL)
    name, start = section.split("\ninit = ")
    words = [set(re.findall(r"\w+", part.partition("#")[2])) for part in (name, start)]
    assert words[0] - {"or"} == {*routers.names()}
    assert words[1] >= {*router_starts.names()}


def test_every_target_whose_layers_can_stay_dense_is_named():
    (said,) = re.findall(r"In ([^.]+?),\s+some layers can stay dense", PAGE)
    assert re.split(r",\s+|\s+and\s+", said) == natives.with_dense_layers()
