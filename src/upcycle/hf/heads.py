"""The head of a causal language model: a linear map of hidden states to logits, and what follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Head:
    """The head of a model of transformers: logits of [T, V] from hidden states [T, H].

    Cohere multiplies them by `factor`, Granite divides them by `divisor`, and Gemma 2 and 3 bound them by
    `cap` x tanh(logits / cap).
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    factor: float | None = None
    divisor: float | None = None
    cap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head | None:
        """Return the head of `model`; None if it is no linear map, or if ranks share its weight."""
        linear = model.get_output_embeddings()
        if type(linear) is not nn.Linear or isinstance(linear.weight, DTensor):
            return None
        config: Any = model.config.get_text_config()
        return cls(
            weight=linear.weight,
            bias=linear.bias,
            factor=getattr(config, "logit_scale", None),
            divisor=getattr(config, "logits_scaling", None),
            cap=getattr(config, "final_logit_softcapping", None),
        )

    def finished(self, products: Tensor) -> Tensor:
        """Return the logits [..., V] for the products [..., V] of hidden states and the weight."""
        if self.factor is not None:
            products = products * self.factor
        if self.divisor is not None:
            products = products / self.divisor
        if self.cap is not None:
            products = torch.tanh(products / self.cap) * self.cap
        return products
