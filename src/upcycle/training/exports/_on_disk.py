"""A trained model as the tensors of a folder, in the form in which `upcycle convert` would write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from upcycle.checkpoints.dtypes import TORCH_NAMES, cast, refuse_infinite
from upcycle.checkpoints.header import TensorInfo
from upcycle.hf import building
from upcycle.loading import as_array, as_tensor
from upcycle.tensors.entries import Entry
from upcycle.tensors.lazy import Index, Lazy
from upcycle.training.start import Start


def on_disk(model: PreTrainedModel, begun: Start, types: Mapping[str, str]) -> dict[str, Tensor]:
    """Return every tensor by its name on disk, in the type that `types` gives it there.

    The way back is the inverse of the way on which the model was built, so names and shapes are those of
    `Start.entries`. It changes the model's own tensors to these types, because there may be no room for both.
    Raises `UpcycleError` if a value is too large for its type.
    """
    wanted = {name: replace(entry, dtype=types[name]) for name, entry in begun.entries.items()}
    whole = begun.in_memory(wanted)
    parts = building.split(model, whole)
    names = building.renamed(model, parts)
    held = {}
    for own, tensor in model.state_dict(keep_vars=True).items():
        if (name := names.get(own)) is not None:  # else it is tied to one that has a name
            dtype = parts[name].dtype
            tensor.data = _narrowed(tensor.data, dtype, name)
            held[name] = Entry(_Held(as_array(tensor), dtype, name), dtype)
    made = begun.on_disk(building.joined(model, held, whole))
    shapes = {name: entry.shape for name, entry in made.items()}
    if shapes != {name: entry.shape for name, entry in wanted.items()}:
        changed = sorted(n for n in {*made, *wanted} if n not in made or n not in wanted)
        changed += [n for n in made if n in wanted and made[n].shape != wanted[n].shape]
        raise AssertionError(f"{type(model).__name__} and its tensors on disk do not agree: {changed}")
    return {name: as_tensor(entry.lazy.all(types[name])) for name, entry in made.items()}


def _narrowed(values: Tensor, dtype: str, name: str) -> Tensor:
    """Return contiguous values in a type. Raises `UpcycleError` if one of them is too large for it."""
    out = values.to(getattr(torch, TORCH_NAMES.get(dtype, "int64"))).contiguous()
    if out.dtype != values.dtype and out.is_floating_point():
        refuse_infinite(as_array(out), as_array(values.contiguous()), dtype, name)
    return out


@dataclass(frozen=True, eq=False)
class _Held(Lazy):
    """A tensor that is in memory."""

    values: np.ndarray
    dtype: str
    name: str

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.values.shape

    def read(self, index: Index, dtype: str) -> np.ndarray:
        slices = tuple(slice(start, stop) for start, stop in index)
        return np.array(cast(self.values[slices], dtype, self.name))

    def describe(self) -> Any:
        return ["held", self.name]

    def sources(self) -> Iterator[TensorInfo]:
        return iter(())
