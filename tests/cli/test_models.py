"""The page that says what each model becomes is what the code says."""

from __future__ import annotations

from pathlib import Path

from upcycle import families
from upcycle.cli import models
from upcycle.families._wrappers import WRAPPERS


def test_the_page_is_what_the_code_says():
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert page.read_text() == models.markdown(), "make it anew: upcycle list --markdown > docs/models.md"


def test_every_family_and_every_wrapper_is_on_it():
    page = models.markdown()
    for name in (*families.names(), *WRAPPERS, *families.REFUSED, *families.SAME):
        assert f"`{name}`" in page
