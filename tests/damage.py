"""Damage to JSON values."""

from __future__ import annotations

import math
import random


def spoil(drawn: random.Random, value):
    """`value` with one of its leaves or branches replaced by something else."""
    if isinstance(value, (dict, list)) and value and drawn.random() < 0.85:
        key = drawn.choice([*value] if isinstance(value, dict) else range(len(value)))
        value[key] = spoil(drawn, value[key])
        return value
    depth = drawn.choice([80, 900])
    odd = ["\x00", "\x1b[31m", "\ud800", "\uffff", 10**400, _deep]
    found = drawn.choice([None, -1, 0, 1e400, "x", [], {}, [1], {"a": 1}, True, 2**70, math.nan, *odd])
    return _deep(depth) if found is _deep else found


def _deep(depth: int) -> list:
    """A list in a list in a list, `depth` times."""
    found: list = []
    for _ in range(depth):
        found = [found]
    return found
