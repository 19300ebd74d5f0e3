"""`upcycle.advise`."""

from __future__ import annotations

from pathlib import Path

from upcycle.advice import gather
from upcycle.advice.gather import Advice
from upcycle.advice.situation import Budget
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.recipe import Recipe, RecipeLike


def advise(
    source: str | Path | Checkpoint,
    recipe: RecipeLike = None,
    *,
    tokens: int | str,
    dense_tokens: int | str | None = None,
    gpus: int | None = None,
    gpu: str = "H100",
    context: int | None = None,
) -> Advice:
    """Compare dense continuation, upcycling and training from scratch before anything is spent.

    `tokens` are those of the training that would come now, and `dense_tokens` those that `source` was trained
    on. Both are numbers, or texts such as "100B". `gpus` of the kind `gpu` do the training; `context` is the
    length of a row of text in tokens. The result has the verdict, the statements with their sources, and a
    recipe (`recommended`). Only headers are read. Raises `UpcycleError` if source, recipe and question do not
    fit.
    """
    # Budget reads texts such as "100B" itself.
    asked = Budget(tokens=tokens, dense_tokens=dense_tokens, gpus=gpus, gpu=gpu, context=context)  # type: ignore[arg-type]
    return gather.advise(source, Recipe.of(recipe), asked)
