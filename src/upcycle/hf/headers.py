"""Runs transformers' own loader on names and shapes alone, without reading any weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from upcycle.hf import implementations


@dataclass(frozen=True, kw_only=True)
class Header:
    """A stored tensor without data, with the interface that the loader expects; loads to meta."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it

    def get_shape(self) -> list[int]:
        """Return the shape of the whole tensor."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return the dtype as safetensors spells it."""
        return self.dtype

    def __getitem__(self, _: object) -> Header:
        return self

    def to(self, *, device: object, dtype: torch.dtype) -> torch.Tensor:
        """Return an empty tensor on the meta device, where the loader would copy the data."""
        return torch.empty(self.shape, dtype=dtype, device="meta")


def loaded(
    cls: type[PreTrainedModel], folder: Path, headers: Mapping[str, Header]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model of class `cls` and the loading report, on the meta device.

    The config is the one in `folder`.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    implementations.refrain(config, str(folder / "config.json"))
    model, report = cls.from_pretrained(
        None, config=config, state_dict=dict(headers), dtype="float32", output_loading_info=True
    )
    return model, report
