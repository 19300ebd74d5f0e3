"""The head over the vocabulary: tied to the embeddings as in the dense model, or stored on its own."""

from __future__ import annotations

from collections.abc import Mapping

from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError
from upcycle.families import Config, Weights
from upcycle.families._weights import Matrix
from upcycle.recipe import Recipe
from upcycle.tensors.entries import Entry
from upcycle.tensors.lazy import Lazy


def weights(dense: Dense, recipe: Recipe, entries: Mapping[str, Entry]) -> Weights:
    """Return the kind of a head that the dense model does not store; nothing if there is none."""
    tied = dense.family.tied
    if not recipe.moe.untie or tied is None or tied[0] in dense.weights:
        return {}
    return {tied[0]: Matrix(entries[tied[0]].shape)}


def untied(
    dense: Dense, recipe: Recipe, config: Config, tensors: Mapping[str, Lazy]
) -> tuple[Config, Mapping[str, Lazy]]:
    """Return config and tensors with a head of its own, if the recipe asks for one (`moe.untie`).

    The head is a copy of the embeddings, so the function is kept. Raises `UpcycleError` for a model whose
    class cannot have a tied head.
    """
    if not recipe.moe.untie:
        return config, tensors
    tied = dense.family.tied
    if tied is None or not dense.has_language_head:
        raise UpcycleError(
            f"moe.untie is for a model whose head can be tied to its embeddings, and a "
            f"{dense.family.model_type} of this class has none; take it out"
        )
    if not dense.is_whole:
        raise UpcycleError(
            "moe.untie is for a model that is all of its checkpoint and has a head, and this one lies within "
            "another or has none; take it out"
        )
    head, table = tied
    if head in tensors:  # the source stores one
        return config, tensors
    return {**config, "tie_word_embeddings": False}, {**tensors, head: tensors[table]}
