"""SIGKILL at random moments, six for each command. `make attack` does a hundred."""

from __future__ import annotations

import random
from pathlib import Path

import kills
import pytest
from workshop import Workshop

import forked
from marks import quick

TIMES = 6


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("killed"))


@pytest.mark.parametrize("command", quick(kills.KILLED, "convert"))
def test_a_kill_at_any_moment(command: str, server: forked.Server, shop: Workshop, tmp_path: Path) -> None:
    arena = kills.Arena(shop, server, tmp_path, random.Random(command))
    kills.KILLED[command](arena, TIMES)
    assert arena.started == TIMES
    assert arena.killed >= TIMES // 3
