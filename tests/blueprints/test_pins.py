"""Blueprint hashes, bytes of conversions and losses of seeded runs are what they were."""

from __future__ import annotations

import json

import pytest

import pins

PINNED = json.loads(pins.FILE.read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("pins")


def test_every_pin_is_looked_at():
    assert pins.CONVERSIONS.keys() == PINNED["conversions"].keys()
    assert pins.RUNS.keys() == PINNED["runs"].keys()


@pytest.mark.parametrize("name", pins.CONVERSIONS)
def test_conversions(name, home):
    assert pins.converted(name, home) == PINNED["conversions"][name]


@pytest.mark.parametrize("name", pins.RUNS)
def test_losses_of_seeded_runs(name, home):
    # Kernels of another processor round otherwise.
    assert pins.trained(name, home) == pytest.approx(PINNED["runs"][name], rel=1e-5)
