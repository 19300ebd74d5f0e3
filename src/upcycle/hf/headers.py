"""transformers' own loader, tried on names and shapes without a byte of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Header:
    """A stored tensor as the loader asks for it, without data: it lands on the meta device."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it

    def get_shape(self) -> list[int]:
        """The whole tensor's."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """As safetensors spells it."""
        return self.dtype

    def __getitem__(self, _: object) -> Header:
        return self

    def to(self, *, device: object, dtype: torch.dtype) -> torch.Tensor:
        """Where the loader would copy the data."""
        return torch.empty(self.shape, dtype=dtype, device="meta")


def loaded(
    cls: type[PreTrainedModel], folder: Path, headers: Mapping[str, Header]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of class `cls` and the config in `folder`, on the meta device, and the loading report."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model, report = cls.from_pretrained(
        None, config=config, state_dict=dict(headers), dtype="float32", output_loading_info=True
    )
    return model, report
