"""What MoE layers know of a forward pass: its padding, and the shape of its batch.

A layer keeps these two marks as attributes. With activation checkpointing it is computed again in the
backward pass, when another forward pass may have come between: a contrastive loss is of two texts. So the
layers of a block that transformers checkpoints, reentrant or not, get the marks of their own pass again. A
checkpoint that is put around a block by other means recomputes with those of the last pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from upcycle.nn.moe import MoE

Marks = list[tuple[Tensor | None, Size | None]]  # the padding and the batch of each layer

_CHECKPOINT = "_gradient_checkpointing_func"  # the attribute of a block that transformers sets


def install(stack: nn.Module, layers: Sequence[MoE]) -> None:
    """Let `stack` mark its MoE layers before each forward pass."""
    able = [module for module in stack.modules() if hasattr(module, "gradient_checkpointing")]
    inside = ((module, [m for m in module.modules() if isinstance(m, MoE)]) for module in able)
    blocks = [(module, own) for module, own in inside if own]
    # A partial, not a closure: a copy of the model calls its own layers.
    stack.register_forward_pre_hook(functools.partial(_mark, layers, blocks), with_kwargs=True)


def _mark(
    layers: Sequence[MoE],
    blocks: Sequence[tuple[nn.Module, Sequence[MoE]]],
    stack: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Give the attention mask and the rows of tokens to the MoE layers of a stack before its forward pass."""
    given = dict(zip(inspect.signature(stack.forward).parameters, args, strict=False)) | kwargs
    mask = given.get("attention_mask", given.get("pixel_attention_mask"))
    padding = mask == 0 if torch.is_tensor(mask) and mask.ndim == 2 else None
    tokens = next((x for x in map(given.get, ("input_ids", "inputs_embeds")) if torch.is_tensor(x)), None)
    for layer in layers:
        layer.padding = padding
        layer.batch = tokens.shape[:2] if tokens is not None and tokens.ndim > 1 else None
    for block, own in blocks:
        if block.gradient_checkpointing:
            _bind(block, own)


def _bind(block: nn.Module, layers: Sequence[MoE]) -> None:
    """Let the checkpoints of `block` keep the marks of `layers`.

    This is done before a pass, because any model around this one may switch checkpointing on.
    """
    checkpoint = getattr(block, _CHECKPOINT)
    if getattr(checkpoint, "func", None) is not _checkpoint:
        setattr(block, _CHECKPOINT, functools.partial(_checkpoint, layers, checkpoint))


def _checkpoint(
    layers: Sequence[MoE], checkpoint: Callable[..., Any], run: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Checkpoint `run`, in which `layers` have the marks that they have now whenever it is computed."""
    if torch.compiler.is_compiling():  # marks are inputs of the compiled graph, which keeps them
        return checkpoint(run, *args, **kwargs)
    return checkpoint(functools.partial(_marked, layers, _marks(layers), run), *args, **kwargs)


def _marked(layers: Sequence[MoE], marks: Marks, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    last = _marks(layers)
    _put(layers, marks)
    try:
        return run(*args, **kwargs)
    finally:
        _put(layers, last)


def _marks(layers: Sequence[MoE]) -> Marks:
    return [(layer.padding, layer.batch) for layer in layers]


def _put(layers: Sequence[MoE], marks: Marks) -> None:
    for layer, (padding, batch) in zip(layers, marks, strict=True):
        layer.padding, layer.batch = padding, batch
