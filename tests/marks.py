"""Which cases of a parametrised test are quick, so that they run with every `make test`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """The cases, of which all but `kept` are slow."""
    cases = list(cases)
    assert all(case in cases for case in kept), f"{kept} are not all cases of {cases}"
    return [case if case in kept else _slow(case) for case in cases]


def sampled(cases: Iterable[Any], step: int) -> list[Any]:
    """The cases, of which the first of every `step` is quick and the others are slow."""
    return [case if i % step == 0 else _slow(case) for i, case in enumerate(cases)]


def _slow(case: Any) -> Any:
    if hasattr(case, "marks"):  # a `pytest.param`
        return pytest.param(*case.values, marks=[*case.marks, pytest.mark.slow], id=case.id)
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
