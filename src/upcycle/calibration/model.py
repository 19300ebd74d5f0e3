"""The dense model that is calibrated, in memory."""

import torch
from transformers import PreTrainedModel

from upcycle.dense.source import Dense
from upcycle.hf import models, opening
from upcycle.hf.quiet import quiet


def opened(dense: Dense, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a dense checkpoint, without the tensors that are dropped, ready to be run."""
    with quiet():
        cls = models.architecture(dense.architecture)
        model = opening.fill(cls, dense.checkpoint.folder, left_out=dense.left_out, dtype=dtype)
    opening.tie_dropped(model, dense)
    model.requires_grad_(False)
    return model.to(device).eval()
