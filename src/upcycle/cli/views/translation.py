"""Draws the result of `upcycle recipe`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.cli.screen import err, out
from upcycle.errors import UpcycleError
from upcycle.system import claim, whole_file

if TYPE_CHECKING:
    from upcycle.translation.mergekit_moe import Translation


def write_translated(made: Translation, recipe: Path) -> list[Path]:
    """Write the recipe to a file, and the prompts beside it, and return the files.

    Their folder is made, and no file is replaced.
    """
    prompts = _prompts(recipe)
    files = {recipe: made.recipe_text(str(recipe), str(prompts))}
    if made.prompts:
        files[prompts] = made.prompts_text
    for file in files:
        claim.may_create(file)
    for file, text in files.items():
        _write(file, text)
    return [*files]


def show_translated(made: Translation, recipe: Path | None, written: Sequence[Path]) -> None:
    """Show the files that were written and what to do with them, or the recipe; remarks go to stderr."""
    for remark in made.remarks:
        err.print(f"! {remark}", soft_wrap=True, markup=False, highlight=False)
    if recipe is None:
        for line in made.recipe_text("RECIPE.toml").removesuffix("\n").split("\n"):
            out.print(line, soft_wrap=True, markup=False, highlight=False)
        if made.prompts:
            err.print("! --out FILE.toml writes the prompts as well, beside the recipe", soft_wrap=True)
        return
    for line in [*map(str, written), *made.commands(str(recipe), str(_prompts(recipe)))]:
        out.print(line, soft_wrap=True, markup=False, highlight=False)


def _prompts(recipe: Path) -> Path:
    """Return the file of the prompts beside a recipe."""
    return recipe.with_name(f"{recipe.stem}_prompts.toml")


def _write(file: Path, text: str) -> None:
    try:
        whole_file.write_text(file, text)
    except OSError as error:
        raise UpcycleError(f"{file} cannot be written: {error.strerror}") from None
