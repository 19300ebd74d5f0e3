"""`upcycle.translate`."""

from __future__ import annotations

from pathlib import Path

from upcycle.translation import mergekit_moe
from upcycle.translation.mergekit_moe import Translation


def translate(config: str | Path) -> Translation:
    """Translate a configuration of mergekit-moe (YAML) to a recipe, and its prompts to a file of prompts.

    The result has the recipe as a table and as text, and a sentence for each thing that is not translated.
    Raises `UpcycleError` for a file that is no such configuration.
    """
    return mergekit_moe.translate(config)
