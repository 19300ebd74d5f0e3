"""The balance loss of transformers' Mixtral, which pools the tokens of all layers."""

from __future__ import annotations

from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

__all__ = ["load_balancing_loss_func"]
