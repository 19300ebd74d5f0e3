"""The caveats of a blueprint: what a user is told before any money is spent."""

from __future__ import annotations

import pytest

import tiny
from upcycle import Recipe, plan

LOST = "weights are left out: the function is not kept, and the model has to be trained"
NARROW = {"num_experts": 4, "top_k": 2, "expert_width": 12}


@pytest.mark.parametrize(
    ("table", "warned"),
    [
        ({"moe": NARROW, "init": {"name": "random"}}, True),
        ({"moe": {"num_experts": 4}, "init": {"name": "random"}, "successor": {"hidden_size": 16}}, True),
        ({"moe": {"num_experts": 4}, "init": {"name": "random"}}, False),  # every expert is whole
        ({"moe": {"num_experts": 4}}, False),
        ({"moe": {"num_experts": 4}, "init": {"name": "drop"}}, False),  # redrawn, which it is chosen for
    ],
)
def test_weights_that_are_left_out_are_said(table, warned, dense):
    found = plan(dense("llama"), Recipe.of(table)).warnings
    assert found.count(LOST) == warned


def test_slots_have_a_caveat_of_their_own(tmp_path):
    """They lose the function, whatever weights experts have."""
    moe = {**NARROW, "target": "upcycled"}
    recipe = Recipe.of(moe=moe, init={"name": "random"}, router={"name": "soft"})
    source = tiny.make(tmp_path / "vit", "ViTModel")
    found = plan(source, recipe).warnings
    assert LOST not in found
    assert "a slot of soft mixes tokens: the function is not kept" in found
