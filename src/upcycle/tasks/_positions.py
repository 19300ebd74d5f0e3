"""The positions of a model: rows of text that are longer cannot be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.errors import UpcycleError

if TYPE_CHECKING:
    from upcycle.dense.subject import Subject


def beyond_positions(length: int, subject: Subject, *, setting: str = "train.sequence_length") -> str | None:
    """Return a sentence about rows longer than the model's positions; None if they are not.

    `setting` is what the caller calls the length.
    """
    most = subject.positions
    if most is None or length <= most:
        return None
    return (
        f"{setting} = {length} and the model takes {most} tokens "
        f"(by max_position_embeddings in its config.json); shorten the rows"
    )


def refuse_beyond_positions(length: int, subject: Subject, *, setting: str = "train.sequence_length") -> None:
    """Raise `UpcycleError` for rows longer than the model's positions, see `beyond_positions`."""
    if (said := beyond_positions(length, subject, setting=setting)) is not None:
        raise UpcycleError(said)
