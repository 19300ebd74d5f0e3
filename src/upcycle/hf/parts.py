"""Internal parts of transformers that upcycle's layers are built from."""

from __future__ import annotations

from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

__all__ = ["ACT2FN", "ALL_EXPERTS_FUNCTIONS"]
