"""Frozen features of images: the input of a model's head (pre-logits)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from upcycle.data.augment import Augment
from upcycle.data.images import ImageSet

_HEADS = ("classifier", "cls_classifier")


@torch.inference_mode()
def features(
    model: PreTrainedModel, images: ImageSet, indices: np.ndarray, augment: Augment, *, batch_size: int = 128
) -> np.ndarray:
    """Return the features of the images with the numbers `indices`, float32 [N, D].

    For a model without a head, they are the output of the first token, or the pooled output of a feature map.
    """
    head = next(
        (getattr(model, name) for name in _HEADS if isinstance(getattr(model, name, None), nn.Linear)), None
    )
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].float().cpu())

    hook = None if head is None else head.register_forward_pre_hook(keep)
    model.eval()
    try:
        for start in range(0, len(indices), batch_size):
            pixels = torch.from_numpy(images.read(indices[start : start + batch_size])).to(model.device)
            out = model(pixel_values=augment.evaluate(augment.pixels(pixels)).to(model.dtype))
            if head is None:
                seen.append((out[0][:, 0] if out[0].ndim == 3 else out.pooler_output).float().cpu())
    finally:
        if hook is not None:
            hook.remove()
    return torch.cat(seen).numpy()
