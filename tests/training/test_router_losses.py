"""The router losses of a micro batch against sums by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from upcycle.nn.balance import Balance
from upcycle.training.router_losses import Contribution, contribution
from upcycle.training.routing import RouterOutput, Tally

# Three tokens and two experts. In the first layer tokens choose, in the second experts do (Expert Choice).
CHANCES = ([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]], [[0.3, 0.7], [0.5, 0.5], [0.9, 0.1]])
COUNTS = ([2, 1], [3, 2])
FACTORS = {"balance_loss_coef": 0.5, "z_loss_coef": 0.25, "importance_loss_coef": 3.0, "load_loss_coef": 7.0}
IMPORTANCE, LOAD = 0.4, 0.6  # of the first layer, the sums of two groups
OWN = 1.5  # a loss that the second layer's router brings, with its own coefficient
OWN_COEF = 2.0
# 2 experts x sum of (share of the tokens x mean probability)
BALANCE = 2 * (2 / 3 * (0.8 + 0.6 + 0.1) / 3 + 1 / 3 * (0.2 + 0.4 + 0.9) / 3)
SHIFTS = (1.0, 2.0)  # the log-sum-exp of every token's logits
Z = tuple(shift**2 for shift in SHIFTS)


def layer(number: int, **changes: Any) -> RouterOutput:
    return RouterOutput(
        logits=torch.tensor(CHANCES[number], dtype=torch.float64).log() + SHIFTS[number],
        counts=torch.tensor(COUNTS[number]),
        left_behind=torch.tensor(0),
        top_k=1,
        **changes,
    )


def made(parts: int = 1, **settings: Any) -> Contribution:
    """The contribution of the first of `parts` equal micro batches."""
    number = torch.tensor
    chosen = layer(0, losses={"importance": number(IMPORTANCE), "load": number(LOAD)}, groups=2)
    choosing = layer(1, balanced=True, losses={"own": number(OWN)}, loss_coefs={"own": OWN_COEF})
    tallies = [
        Tally(counts=one.counts, tokens=3, left_behind=0, groups=one.groups, top_k=1, balanced=one.balanced)
        for one in (chosen, choosing)
    ]
    return contribution(
        [chosen, choosing], tallies, Balance(**{**FACTORS, **settings}), share=1 / parts, parts=parts
    )


@pytest.mark.parametrize(("layers", "divided"), [("mean", 2), ("sum", 1)])
@pytest.mark.parametrize("parts", [1, 2])
def test_losses_are_those_of_sums_by_hand(layers: str, divided: int, parts: int) -> None:
    """Layers without a loss count as zero: those whose experts choose in the balance loss, as in t5x."""
    found = made(parts, layers=layers)
    share = divided * parts
    assert float(found.balance) == pytest.approx(BALANCE / share)
    assert float(found.z) == pytest.approx(sum(Z) / share)
    assert {name: float(loss) for name, loss in found.own.items()} == {"own": pytest.approx(OWN / share)}
    total = 0.5 * BALANCE + 0.25 * sum(Z) + 3.0 * IMPORTANCE / 2 + 7.0 * LOAD / 2 + OWN_COEF * OWN
    assert float(found.total) == pytest.approx(total / share)


@pytest.mark.parametrize(
    ("coefficient", "loss"),
    [
        ("balance_loss_coef", BALANCE),
        ("z_loss_coef", sum(Z)),
        ("importance_loss_coef", IMPORTANCE / 2),
        ("load_loss_coef", LOAD / 2),
    ],
)
def test_every_loss_has_its_own_weight(coefficient: str, loss: float) -> None:
    alone = dict.fromkeys(FACTORS, 0.0)
    rest = OWN_COEF * OWN
    for factor in (0.0, 0.1):
        total = float(made(layers="sum", **{**alone, coefficient: factor}).total)
        assert total == pytest.approx(rest + factor * loss)


def test_a_loss_without_weight_may_be_infinite() -> None:
    one = layer(0, losses={"load": torch.tensor(math.inf)})
    tally = Tally(counts=one.counts, tokens=3, left_behind=0, groups=1, top_k=1, balanced=False)
    settings = Balance(balance_loss_coef=1.0, load_loss_coef=0.0)
    assert float(contribution([one], [tally], settings, share=1, parts=1).total) == pytest.approx(BALANCE)
