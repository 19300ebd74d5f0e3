"""Which cases of a parametrised test are quick, so that they run with every `make test`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """The cases, of which all but `kept` are slow."""
    cases = list(cases)
    assert set(kept) <= set(cases), f"{set(kept) - set(cases)} are no cases"
    return [case if case in kept else pytest.param(case, marks=pytest.mark.slow) for case in cases]
