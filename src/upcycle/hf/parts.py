"""Parts of transformers that lie inside its package and that our layers and losses are made of."""

from __future__ import annotations

from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

__all__ = ["ACT2FN", "ALL_EXPERTS_FUNCTIONS", "load_balancing_loss_func"]
