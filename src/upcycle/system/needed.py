"""Libraries that only some commands need, and the error if one of them is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from upcycle.errors import UpcycleError

# These are needed to train, load, evaluate and compare logits, but not to convert.
OF_MODELS = ("torch", "transformers", "accelerate", "safetensors", "tokenizers")


def missing(error: ModuleNotFoundError) -> UpcycleError | None:
    """Return the error for a missing library of `OF_MODELS`; None if another library is missing."""
    library = (error.name or "").partition(".")[0]
    if library not in OF_MODELS:
        return None
    return UpcycleError(
        f"this needs {library}, which is not installed: pip install upcycle brings everything; plan, "
        f"convert, advise, list and keys work without it"
    )


@contextmanager
def said_if_missing() -> Iterator[None]:
    """Raise `UpcycleError` instead of Python's error if the block lacks a library of `OF_MODELS`.

    It serves as a decorator as well, for functions that import such a library when they are called.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if sentence := missing(error):
            raise sentence from error
        raise
