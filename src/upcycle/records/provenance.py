"""`upcycle.json`: the source, recipe and program of a checkpoint. It is beside the weights."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from upcycle.records.reader import Document, Record, Table, WrongError, load, sometimes


@dataclass(frozen=True, kw_only=True)
class DonorRecord(Record):
    """A checkpoint that tensors come from, with the SHA-256 of its files by name."""

    name: str
    path: str
    sha256: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class MadeFrom(Record):
    """The dense checkpoint that a folder was made from, and the donors beside it by label.

    A path begins with `~` if it lies in the home folder. Otherwise it is relative to the folder that was
    made, or a name alone; older versions wrote it absolute.
    """

    name: str
    path: str
    model_type: str = sometimes("")
    sha256: Mapping[str, str]
    donors: Mapping[str, DonorRecord]

    def seen_from(self, made: Path) -> Path:
        """Return the path of its folder, for the folder `made` that was made from it."""
        path = Path(self.path)
        try:
            path = path.expanduser()
        except RuntimeError:
            return path
        return path if path.is_absolute() else Path(os.path.normpath(made.resolve() / path))


@dataclass(frozen=True, kw_only=True)
class Training(Record):
    """The training run that a checkpoint was exported from, and its progress. Losses are in nats."""

    upcycle_version: str | None = sometimes()
    versions: Mapping[str, str] | None = sometimes()
    precision: str | None = sometimes()
    task: str | None = sometimes()
    training_flops_per_token: float | None = sometimes()  # the mean over all steps of the run
    training_flops: float | None = sometimes()  # of the run up to this step
    from_scratch: bool | None = sometimes()
    run: Table | None = sometimes()  # the run file
    source_hashed: str | None = sometimes()  # the moment at which the source was hashed
    step: int
    averaged_steps: tuple[int, ...] | None = (
        sometimes()
    )  # of the checkpoints that the weights are the mean of
    average_decay: float | None = sometimes()  # of their exponential moving average; None: a plain mean
    expert: int | None = sometimes()  # the expert that is the network of each layer; None: the whole model
    loss: float | None = sometimes()
    held_out_start: float | None = sometimes()
    held_out_loss: float | None = sometimes()
    held_out_accuracy: float | None = sometimes()
    tokens: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.tokens):
            raise WrongError(f"is {self.tokens}, not a number of tokens", "tokens")

    @property
    def spent(self) -> float:
        """The training FLOPs up to this step; NaN if nothing tells them.

        Older versions recorded the mean of the run alone. It is exact unless stages of unequal cost are left.
        """
        if self.training_flops is not None:
            return self.training_flops
        return float(self.tokens) * (self.training_flops_per_token or math.nan)


@dataclass(frozen=True, kw_only=True)
class Provenance(Document):
    """The origin of a checkpoint.

    It holds no time, so that running a recipe twice gives equal folders. A dense model that was only trained
    further has neither a recipe nor a blueprint hash.
    """

    FILE: ClassVar[str] = "upcycle.json"

    format: int
    upcycle_version: str | None = sometimes()
    numpy_version: str | None = sometimes()
    python_version: str | None = sometimes()
    source: MadeFrom
    target: str | None = sometimes()
    recipe: Table | None
    blueprint_hash: str | None
    preserves_function: bool | None = sometimes()
    moe_layers: Any = sometimes()
    left_out_tensors: Mapping[str, str] | None = sometimes()  # the reason, by name of the tensor
    left_out_config_keys: tuple[str, ...] | None = sometimes()
    carried_files: tuple[str, ...] | None = sometimes()
    made_anew_files: Mapping[str, str] | None = sometimes()  # the reason, by name: not as the source has it
    left_behind_files: tuple[str, ...] | None = sometimes()
    files: Mapping[str, str] | None = sometimes()  # SHA-256 of the files written beside the weights
    training: tuple[Training, ...] | None = sometimes()  # the runs since then, the first one first

    def __post_init__(self) -> None:
        if (self.recipe is None) != (self.blueprint_hash is None):
            raise WrongError("and blueprint_hash are not both there", "recipe")
        if self.recipe is not None:
            refuse_other_recipe(self.recipe)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the provenance in a folder. Raises `UpcycleError` if it is missing or damaged."""
        missing = f"{folder} has no {cls.FILE}; it was not made by `upcycle convert`, or lost its provenance"
        return cls.of(load(folder / cls.FILE, missing), str(folder / cls.FILE))


def refuse_other_recipe(recipe: Table) -> None:
    """Raise an error for a recorded recipe that does not say how its experts were made."""
    moe, init = recipe.get("moe"), recipe.get("init")
    if not isinstance(moe, Mapping):
        raise WrongError("is missing in it, or is not a table", "recipe", "moe")
    if not isinstance(recipe.get("router", {}), Mapping):
        raise WrongError("is not a table", "recipe", "router")
    if not isinstance(init, Mapping) or not isinstance(init.get("name"), str):
        raise WrongError("is missing in it, or is not a text", "recipe", "init", "name")
