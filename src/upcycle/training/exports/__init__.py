"""Formats for exporting a trained model. Each file here is one.

A file `NAME.py` defines a class derived from `Format` and binds it to the module name `format`; NAME is the
value of `upcycle export --format`.
"""

from __future__ import annotations

import abc
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from upcycle import registry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from upcycle.conversion.provenance import Hashes
    from upcycle.records.run import RunRecord
    from upcycle.records.state import RunState
    from upcycle.training.beside import Beside
    from upcycle.training.run import Run
    from upcycle.training.start import Start

DEFAULT = "huggingface"
OF_EXPERT = "expert"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A checkpoint of a run, loaded whole in memory, with the facts known about it."""

    name: str  # name of the run's folder
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer | None  # with its state, if it is to be exported
    start: Start
    run: Run
    record: RunRecord
    state: RunState
    beside: Beside  # the tokenizer of its data and the files of its task
    hashes: Hashes  # hashes of the files that the run started from
    types: Mapping[str, str]  # the safetensors type of each tensor on disk, by its name there
    expert: int | None = None  # the expert that is asked for
    averaged: tuple[int, ...] = ()  # steps of the checkpoints that the weights are the mean of, if of several
    decay: float | None = None  # of their exponential moving average

    @property
    def step(self) -> int:
        """The number of updates to the weights."""
        return self.state.step


class Format(abc.ABC):
    """A file layout for a model."""

    summary: ClassVar[str]
    holds_moments: ClassVar[bool] = False  # whether it can store the optimizer's moments
    takes_expert: ClassVar[bool] = False  # whether it is of one expert, which has to be named

    @abc.abstractmethod
    def write(self, trained: Trained, folder: Path, dtype: str) -> None:
        """Write everything to the existing `folder`.

        `dtype` is the torch name of the dtype in config.json, and `trained.types` has that of each tensor.
        It may change the model's tensors. If it raises, the caller removes the folder.
        """

    def parameters(self, trained: Trained) -> int:
        """Return the number of parameters that are written."""
        return trained.start.parameters


def find(name: str) -> Format:
    """Return the format called `name`. Raises `UpcycleError` for an unknown name."""
    found: type[Format] = registry.find(sys.modules[__name__], name, "format", "format")
    return found()


def names() -> list[str]:
    """Return the names of all formats."""
    return registry.names(sys.modules[__name__])
