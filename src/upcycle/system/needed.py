"""Libraries that only some work needs, and what is said if one of them is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from upcycle.errors import UpcycleError

# Training, loading, evaluating, and the comparison of logits need these; a conversion does not.
OF_MODELS = ("torch", "transformers", "accelerate", "safetensors", "tokenizers")


def missing(error: ModuleNotFoundError) -> UpcycleError | None:
    """The sentence for a library of `OF_MODELS` that is not installed; None if another one is missing."""
    library = (error.name or "").partition(".")[0]
    if library not in OF_MODELS:
        return None
    return UpcycleError(
        f"this needs {library}, which is not installed: pip install upcycle brings everything; plan, "
        f"convert, advise, list and keys work without it"
    )


@contextmanager
def said_if_missing() -> Iterator[None]:
    """Raise `UpcycleError` in place of Python's error if the block lacks a library of `OF_MODELS`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if sentence := missing(error):
            raise sentence from error
        raise
