"""Panics of libraries that are written in Rust, such as tokenizers and safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_PANIC = "PanicException"  # PyO3 derives it from BaseException and gives it no module to import it from


class PanicError(Exception):
    """A library gave up on its input instead of raising an error."""


@contextmanager
def caught() -> Iterator[None]:
    """Raise `PanicError` in place of a panic within the block, so that `except Exception` sees it."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != _PANIC:
            raise
        raise PanicError(str(error) or "it panicked") from None
