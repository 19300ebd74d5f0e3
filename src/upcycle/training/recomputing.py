"""Activation checkpointing: blocks are computed again in the backward pass, wholly or in part.

The selective form keeps the outputs of matrix products and of attention, which cost most to compute, and
computes the rest again: norms, activations, softmaxes ("Reducing Activation Recomputation in Large
Transformer Models", section 5, which keeps less).
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from upcycle.errors import UpcycleError

# Names of operators of torch.ops.aten; a version of torch may lack some.
_KEPT = (
    "mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "convolution", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip


def install(model: PreTrainedModel, how: Literal[True, "selective"]) -> None:
    """Keep only the input of each block (True), or also what is costly to compute (`selective`)."""
    if not model.supports_gradient_checkpointing:
        raise UpcycleError(
            f"train.activation_checkpointing: transformers has none for {type(model).__name__}; set it to "
            f"false, and lower train.micro_batch if memory is short"
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.23
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@functools.cache
def _kept() -> frozenset[Any]:
    return frozenset(getattr(torch.ops.aten, name).default for name in _KEPT if hasattr(torch.ops.aten, name))


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _kept() else CheckpointPolicy.PREFER_RECOMPUTE
