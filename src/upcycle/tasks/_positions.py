"""The positions of a model: rows of text that are longer cannot be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError

if TYPE_CHECKING:
    from upcycle.dense.source import Dense

CONTEXT = 4096  # tokens of a text if none are given and the model has as many positions


def beyond_positions(length: int, subject: Subject, *, setting: str = "train.sequence_length") -> str | None:
    """Return a sentence about rows longer than the model's positions; None if they are not.

    `setting` is what the caller calls the length.
    """
    most = subject.positions
    if most is None or length <= most:
        return None
    return (
        f"{setting} = {length} and the model takes {most} tokens "
        f"(by {subject.positions_key} in its config.json); shorten the rows"
    )


def refuse_beyond_positions(length: int, subject: Subject, *, setting: str = "train.sequence_length") -> None:
    """Raise `UpcycleError` for rows longer than the model's positions, see `beyond_positions`."""
    if (said := beyond_positions(length, subject, setting=setting)) is not None:
        raise UpcycleError(said)


def row_of(dense: Dense, context: int | None, *, setting: str) -> dict[str, int]:
    """Return the tokens of a row in each stack of blocks.

    They are those of an image, or of a text of `context` tokens. If that is None, it is `CONTEXT` tokens, or
    as many as the model takes. `setting` is what the caller calls `context`.
    Raises `UpcycleError` if they are more than the model has positions.
    """
    family, config = dense.family, dense.config
    if "image_size" in config:
        return family.lengths(config)
    length = context or min(CONTEXT, family.length(config))
    refuse_beyond_positions(length, Subject.of_dense(dense), setting=setting)
    return family.row(config, length)
