"""`run.json`: the settings and the model of a training run. It is in the folder of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from upcycle.records.reader import Document, Record, Table, WrongError, sometimes

_SECTIONS = ("train", "data")
_OPTIONAL_SECTIONS = ("moe", "init", "router", "task", "successor", "teacher")


@dataclass(frozen=True, kw_only=True)
class StartedFrom(Record):
    """The dense checkpoint that a run starts from."""

    name: str
    path: str
    model_type: str


@dataclass(frozen=True, kw_only=True)
class RunRecord(Document):
    """A run: its run file, and the size and cost of its model."""

    FILE: ClassVar[str] = "run.json"

    format: int
    upcycle_version: str
    versions: Mapping[str, str]
    precision: str
    task: str
    tokens_per_row: int
    training_flops_per_row: int
    training_flops_per_token: int
    source: StartedFrom
    blueprint_hash: str | None
    architecture: str
    parameters: int
    active_parameters: int
    from_scratch: bool
    run: Table  # the run file
    identity: Table  # settings that a resumed run must share with this one
    source_sha256: Mapping[str, Mapping[str, str]] | None = sometimes()  # keyed by checkpoint and file

    def __post_init__(self) -> None:
        for name in ("tokens_per_row", "training_flops_per_row", "parameters", "active_parameters"):
            if getattr(self, name) < 1:
                raise WrongError(f"is {getattr(self, name)}, not 1 or more", name)
        refuse_other_sections(self.run)


def refuse_other_sections(run: Table) -> None:
    """Raise an error for a run file in which a section is not a table."""
    for name in (*_SECTIONS, *(name for name in _OPTIONAL_SECTIONS if name in run)):
        if not isinstance(run.get(name), Mapping):
            raise WrongError("is missing in it, or is not a table", "run", name)
