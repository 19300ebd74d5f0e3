"""Both models, opened as a user opens them, and asked the same questions.

A user knows the Auto classes alone. So each folder is opened by the Auto class of its task, and the
classes that this gives are compared with the ones that the blueprint speaks of. One model is in memory at a
time. Whatever transformers raises becomes a check that fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from upcycle.blueprints import stored_types
from upcycle.blueprints.blueprint import Blueprint
from upcycle.errors import UpcycleError
from upcycle.system import memory
from upcycle.system.wording import size
from upcycle.verification.proof import Check, reason

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Question(Protocol):
    """Something that is asked of both models in the same words."""

    @property
    def name(self) -> str:
        """The name of its line in the report."""

    def ask(self, model: PreTrainedModel) -> Any:
        """Return the answer of one model."""

    def compare(self, dense: Any, moe: Any, stored: Any | None) -> Check:
        """Return the check of two answers.

        `stored` is the answer of the dense model as it is stored, if the MoE is rounded to a narrower type.
        """


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the folders: its role, the class that it should be opened as, and the type to round it to."""

    role: str
    folder: Path
    model_types: tuple[str, ...]  # in config.json, to the letter, and what transformers takes it for
    architecture: str
    dtype: torch.dtype | None = None
    one_by_one: bool = False  # run the experts one by one, which needs no kernel that restricts their width


class FailedError(Exception):
    """One of the sides could not be opened or could not answer; the text is the finding."""


def sides(built: Blueprint, out: Path) -> list[Side]:
    """Return the dense model, the MoE, and the dense model as it is stored if the MoE is rounded."""
    import torch

    source, raw, whole = built.source.folder, built.source.config, built.dense.whole
    # A class around the model that upcycle does not know is the one that config.json names.
    name = whole.architecture or str((raw.get("architectures") or [""])[0])
    rounded = None if built.recipe.dtype == "source" else getattr(torch, built.recipe.dtype)
    types = (str(raw["model_type"]), built.dense.family.model_type)
    dense = Side(role="source", folder=source, model_types=types, architecture=name)
    moe = Side(
        role="result",
        folder=out,
        model_types=(built.target.model_type,),
        architecture=built.target.architecture,
        one_by_one=True,
    )
    return [replace(dense, dtype=rounded), moe, *([dense] if built.narrowed else [])]


def checks(built: Blueprint, out: Path, questions: Sequence[Question]) -> list[Check]:
    """Ask both models every question, in float32; return the check of the classes and one for each question.

    A question that one side cannot answer fails, and the others are asked all the same.
    """
    _check_memory(built)
    answers: list[dict[str, Any]] = []
    try:
        for side in sides(built, out):
            answers.append(_answers(built, side, questions))
    except FailedError as failed:
        return [Check(name="Auto classes", holds=False, detail=str(failed))]
    dense, moe, *stored = answers
    opened = f"the source opens as {dense['opened']}, the result as {moe['opened']}"
    out_ = [Check(name="Auto classes", holds=True, detail=opened)]
    for question in questions:
        failed_ = [a[question.name] for a in answers if isinstance(a[question.name], FailedError)]
        if failed_:
            out_.append(Check(name=question.name, holds=False, detail=str(failed_[0])))
            continue
        last = stored[0][question.name] if stored else None
        out_.append(question.compare(dense[question.name], moe[question.name], last))
    return out_


def _answers(built: Blueprint, side: Side, questions: Sequence[Question]) -> dict[str, Any]:
    """Return what one model answers, by question, and how it was opened."""
    import torch

    from upcycle.hf.quiet import quiet

    with quiet(), torch.inference_mode():
        model, opened = _open(built, side)
        found: dict[str, Any] = {"opened": opened}
        for question in questions:
            try:
                found[question.name] = question.ask(model)
            except Exception as error:  # whatever a model raises is the finding
                if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                    raise
                found[question.name] = FailedError(f"the {side.role} cannot be run: {reason(error)}")
    return found


def _open(built: Blueprint, side: Side) -> tuple[PreTrainedModel, str]:
    """Return the model in float32, and its class. Raises `FailedError` if it opens otherwise."""
    import torch

    from upcycle.hf import autos, models, opening

    options: dict[str, Any] = (
        {"experts_implementation": "eager"} if side.one_by_one else {"left_out": built.left_out}
    )
    try:
        if autos.knows(side.model_types[0]):
            opening.read_config(side.folder)  # registers an upcycled type
            known = (autos.auto_class(model_type, side.architecture) for model_type in side.model_types)
            by = next(filter(None, known), None) or models.architecture(side.architecture)
        else:  # of a type that is nobody's, which a user can only open by the class that config.json names
            by = models.architecture(side.architecture)
        model = opening.fill(by, side.folder, dtype=torch.float32, **options)
    except UpcycleError as error:
        raise FailedError(f"the {side.role} cannot be opened: {error}") from error
    found = type(model).__name__
    if found != side.architecture:
        raise FailedError(
            f"{by.__name__} opens the {side.role} as {found}, and not as the {side.architecture} that was "
            f"converted"
        )
    if not side.one_by_one:
        opening.tie_dropped(model, built.dense.whole)
    model = model.float().eval()
    if side.dtype is not None:
        _round(model, side.dtype)
    return model, found


def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the tensors of a model the values that a conversion to `dtype` stores.

    What the class computes by itself, such as the scale of Gemma's embeddings, is in no file and stays.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not stored_types.is_bias(name):
            tensor.copy_(tensor.to(dtype))


def _check_memory(built: Blueprint) -> None:
    """Raise `UpcycleError` if one model in float32 does not fit in memory; only one is loaded at a time."""
    needed = 4 * sum(e.lazy.size for e in built.entries.values())
    free = memory.available()
    if free is not None and needed > free:
        raise UpcycleError(
            f"comparing logits loads the MoE in float32, {size(needed)}, and {size(free)} of "
            f"memory are free; verify the rest with --no-logits"
        )
