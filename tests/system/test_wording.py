"""Numbers as people read and write them."""

from __future__ import annotations

from decimal import Decimal

import pytest

from upcycle.system import wording


@pytest.mark.parametrize(
    ("n", "count", "rounded", "size"),
    [
        (0, "0", "0", "0 B"),
        (999, "999", "999", "999 B"),
        (1_420_000, "1.42 M", "1.42 M", "1.42 MB"),
        (80e9, "80.00 B", "80 B", "80.00 GB"),
        (1.5e12, "1.50 T", "1.5 T", "1.50 TB"),
    ],
)
def test_numbers_are_written(n, count, rounded, size):
    assert (wording.count(n), wording.rounded(n), wording.size(n)) == (count, rounded, size)


UNITS = {"": 1, "k": 10**3, "B": 10**9}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("100B", 10**11),
        ("1.5 k", 1500),
        (" 2_000 ", 2000),
        ("1e9", 10**9),
        ("0.1", Decimal("0.1")),
        (".5k", 500),
        ("123456789012345678", 123456789012345678),
        *((text, None) for text in ("", "k", "-1", "_1", "1e", "1e9B", "1e-3", "inf", "nan", "1 M", "1.2.3")),
    ],
)
def test_numbers_are_read_exactly(text, number):
    assert wording.number_in(text, UNITS) == number
