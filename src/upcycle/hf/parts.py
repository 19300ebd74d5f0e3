"""Internal parts of transformers that upcycle's layers are built from, or that it looks for."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedModel
from transformers.activations import ACT2CLS, ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.moe import _default_apply_gate as default_gate
from transformers.pytorch_utils import Conv1D

__all__ = ["ACT2CLS", "ACT2FN", "ALL_EXPERTS_FUNCTIONS", "Conv1D", "default_gate", "tower"]


def tower(model: PreTrainedModel, types: Collection[str]) -> PreTrainedModel:
    """Return the model of one of the given types within a multimodal one. Raises `LookupError`."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config.model_type in types:
            return module
    raise LookupError(f"{type(model).__name__} holds no {' or '.join(types)}")
