"""The comparison of two outputs: also where they have other shapes, or are no numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import tiny
from upcycle import Recipe, convert, verify
from upcycle.verification.outputs import Outputs

ONES = torch.ones(2, 3, 4)


def asked(*, promised: bool) -> Outputs:
    return Outputs(name="logits, random", inputs={}, built=SimpleNamespace(preserves_function=promised))


@pytest.mark.parametrize(("promised", "holds"), [(False, None), (True, False)])
def test_outputs_of_other_shapes_cannot_be_compared(promised, holds):
    question = asked(promised=promised)
    found = question.compare(ONES, torch.ones(2, 3, 2), None)
    assert found.holds is holds
    assert found.detail == "outputs have other shapes, [2, 3, 4] and [2, 3, 2]; nothing to compare"
    assert not question.found


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 2)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_fails_whatever_is_promised(shape, value):
    odd = torch.full(shape, value)
    for promised in (False, True):
        found = asked(promised=promised).compare(ONES, odd, None)
        assert found.holds is False
        assert "infinities or NaN" in found.detail


def test_a_narrow_body_is_verified(tmp_path):
    """Its last hidden states have fewer channels than those of the source."""
    source = tiny.make(tmp_path / "vit", "ViTModel", hidden_size=32, num_attention_heads=4)
    recipe = Recipe.of(moe={"target": "dense"}, init={"name": "uniform"}, successor={"hidden_size": 16})
    convert(source, tmp_path / "narrow", recipe)
    proof = verify(source, tmp_path / "narrow")
    assert proof.holds, proof.checks
    said = {check.name: check for check in proof.checks}["logits, random"]
    assert said.holds is None
    assert "other shapes, [25, 10, 32] and [25, 10, 16]" in said.detail
