"""`state.json`: the progress of a run. It is in a checkpoint of the run, beside the tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from upcycle.records.reader import DamagedError, Document, Table, WrongError, load, sometimes

_AXES = ("replicate", "fsdp", "tp", "ep")
PRECISIONS = ("float32", "mixed", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class RunState(Document):
    """The state of a run after a step. Losses are the last ones, in nats.

    `batches` is the position in the data. `identity` holds the settings that affect numbers. Files of older
    versions have no hashes.
    """

    FILE: ClassVar[str] = "state.json"

    format: int = sometimes(Document.FORMAT)
    source_sha256: Mapping[str, Mapping[str, str]] | None = sometimes()  # keyed by checkpoint and file
    config_sha256: Mapping[str, Mapping[str, str]] | None = sometimes()  # keyed by checkpoint and key
    blueprint_hash: str | None = sometimes()  # of the model that the run began with, if it has a recipe
    recipe_sha256: Mapping[str, str] | None = sometimes()  # of the recipe's files, keyed by key
    step: int
    held_out_loss: float | None = sometimes()
    held_out_start: float | None = sometimes()
    held_out_accuracy: float | None = sometimes()
    held_out_accuracy_start: float | None = sometimes()
    loss: float | None = sometimes()
    batches: Table
    passed: tuple[int, ...] = sometimes(())  # numbers of the batches that the run leaves out
    recent: tuple[tuple[float, ...], ...] | None = sometimes()  # loss and gradient norm of the last steps
    identity: Table
    micro_batch: int | None = None  # rows of a forward pass, if fewer than the batch has
    precision: str | None = sometimes()  # of its arithmetic: float32, mixed or bfloat16
    layout: Mapping[str, int] | None = (
        sometimes()
    )  # the numbers of ranks that wrote it: replicate, fsdp, tp, ep
    sha256: Mapping[str, str] | None = sometimes()  # hashes of the files of tensors
    state_sha256: str | None = sometimes()  # hash of this file without this line

    def __post_init__(self) -> None:
        if self.step < 0:
            raise WrongError(f"is {self.step}, not 0 or more", "step")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise WrongError(f"is {self.micro_batch}, not 1 or more", "micro_batch")
        if self.precision not in (None, *PRECISIONS):
            raise WrongError(f"is {self.precision}, not {', '.join(PRECISIONS)}", "precision")
        for axis, ranks in (self.layout or {}).items():
            if axis not in _AXES or ranks < 1:
                raise WrongError(f"has {ranks} ranks, and axes are {', '.join(_AXES)}", "layout", axis)

    @property
    def drawn(self) -> int:
        """The number of batches that were taken from the data, with those that were left out."""
        drawn = self.step
        for number in sorted(self.passed):
            drawn += number < drawn
        return drawn

    def sealed(self) -> Self:
        """Return the state with a hash of itself, by which `read` detects changes."""
        return replace(self, state_sha256=_hash_of(self.as_table()))

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """Read the state in a checkpoint. Raises `UpcycleError` if it is not as it was written."""
        path = checkpoint / cls.FILE
        table = load(path, f"{checkpoint} has no {cls.FILE}")
        state = cls.of(table, str(path))
        if state.state_sha256 not in (None, _hash_of(table)):
            raise DamagedError(str(path), "it is not as it was written")
        return state


def _hash_of(table: Table) -> str:
    """Return the SHA-256 of a state without its own hash."""
    told = {key: value for key, value in table.items() if key != "state_sha256"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
