"""Formats that a trained model is exported in. One file here is one format.

A file `NAME.py` defines a class deriving from `Format`, bound to the module name `format`; NAME is what
`upcycle export --format` takes.
"""

from __future__ import annotations

import abc
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from upcycle import registry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from upcycle.training.run import Run
    from upcycle.training.start import Start

DEFAULT = "huggingface"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A checkpoint of a run, whole and in memory, and what is known of it."""

    name: str  # of the run's folder
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer | None  # with its state, if that is to be exported
    start: Start
    run: Run
    record: Mapping[str, Any]  # run.json
    state: Mapping[str, Any]  # what the checkpoint says of itself
    hashes: dict[str, dict[str, str]]  # of the files that the run began from, by checkpoint and file

    @property
    def step(self) -> int:
        """The updates that the weights have had."""
        return int(self.state["step"])


class Format(abc.ABC):
    """A layout of files for a model."""

    summary: ClassVar[str]
    holds_moments: ClassVar[bool] = False  # whether there is a place for the optimizer's moments

    @abc.abstractmethod
    def write(self, trained: Trained, folder: Path, dtype: str) -> None:
        """Write everything to `folder`, which is there; `dtype` is a torch name, for the weights.

        May change the model's tensors. Whatever it raises, the folder goes.
        """


def find(name: str) -> Format:
    """The format called `name`."""
    found: type[Format] = registry.find(sys.modules[__name__], name, "format", "format")
    return found()


def names() -> list[str]:
    """The names of all formats."""
    return registry.names(sys.modules[__name__])
