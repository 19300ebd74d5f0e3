"""Builds a model of transformers from tensors that are read on demand.

transformers' loader asks each tensor for the slice that its rank holds; nothing is read before that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from upcycle.hf.quiet import quiet

_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"


@dataclass(frozen=True, kw_only=True)
class Slices:
    """One tensor with the interface that the loader expects: that of a safetensors slice."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it
    read: Callable[[tuple[tuple[int, int], ...]], torch.Tensor]  # takes (start, stop) for each axis

    def get_shape(self) -> list[int]:
        """Return the shape of the whole tensor."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return the dtype as safetensors spells it."""
        return self.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        parts = () if index is Ellipsis else index if isinstance(index, tuple) else (index,)
        parts = (*parts, *[slice(None)] * (len(self.shape) - len(parts)))
        ranges = [part.indices(n)[:2] for part, n in zip(parts, self.shape, strict=True)]
        return self.read(tuple((a, max(a, b)) for a, b in ranges))


def fill_from(
    cls: type[PreTrainedModel],
    config: Mapping[str, Any],
    tensors: Mapping[str, Slices],
    *,
    dtype: torch.dtype,
    **options: Any,
) -> PreTrainedModel:
    """Return the model of class `cls` and `config`, with every parameter read from `tensors` by name.

    `options` go to `from_pretrained`. A parameter without a tensor, or a tensor without a parameter, is a bug
    in upcycle and raises `AssertionError`.
    """
    made: PreTrainedConfig = cls.config_class.from_dict(
        {k: v for k, v in config.items() if k != "torch_dtype"}
    )
    with quiet(), _one_by_one():
        model, report = cls.from_pretrained(
            None, config=made, state_dict=dict(tensors), dtype=dtype, output_loading_info=True, **options
        )
    if faults := {kind: sorted(map(str, names)) for kind, names in report.items() if names}:
        raise AssertionError(f"{cls.__name__} and its tensors do not agree: {faults}")
    model.name_or_path = model.config.name_or_path = ""
    model._weight_conversions = None  # else save_pretrained would write the in-memory names
    filled: PreTrainedModel = model
    return filled


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Load tensors one at a time: transformers' loader threads would hold several at once."""
    before = os.environ.get(_ONE_BY_ONE)
    os.environ[_ONE_BY_ONE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ONE_BY_ONE]
        else:
            os.environ[_ONE_BY_ONE] = before
