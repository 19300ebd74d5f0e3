"""Internal parts of transformers that upcycle's layers are built from, or that it looks for."""

from __future__ import annotations

from transformers.activations import ACT2CLS, ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

__all__ = ["ACT2CLS", "ACT2FN", "ALL_EXPERTS_FUNCTIONS", "Conv1D"]
