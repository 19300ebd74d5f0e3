"""The mean of several checkpoints of a run, as a model to export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from upcycle.errors import UpcycleError
from upcycle.training import saving


def weights(count: int, decay: float | None) -> list[float]:
    """Return the weights of `count` checkpoints, oldest first; they sum to one.

    Without `decay` all are equal (Izmailov et al. 2018). With it, they are those of an exponential moving
    average that begins at the oldest: each step takes `decay` of the average before and the rest of the new
    one (Li et al. 2025, Model Merging in Pre-training of Large Language Models).
    """
    if decay is None:
        return [1 / count] * count
    return [(1 - decay if place else 1.0) * decay ** (count - 1 - place) for place in range(count)]


def chosen(run: Path, count: int, step: int | None) -> list[Path]:
    """Return the newest `count` checkpoints of a run up to `step`, oldest first.

    Raises `UpcycleError` if there are fewer.
    """
    there = [path for done, path in saving.checkpoints(run) if step is None or done <= step]
    if len(there) == 1:
        alone = f"one checkpoint ({there[0].name})" + ("" if step is None else f" up to step {step}")
        raise UpcycleError(
            f"average = {count}, and {run} has {alone}, which leaves nothing to average; a run that is to be "
            f"averaged needs a higher checkpoint.keep, and checkpoint.every below its number of steps"
        )
    if count < 2 or len(there) < count:
        names = ", ".join(path.name for path in there)
        raise UpcycleError(
            f"average = {count}, and {run} has {len(there)} checkpoints to take ({names}); give a number "
            f"from 2 to that, and raise checkpoint.keep for a run that is to be averaged"
        )
    return there[-count:]


@torch.no_grad()
def load(checkpoints: Sequence[Path], model: PreTrainedModel, decay: float | None) -> None:
    """Fill a model on one process with the mean of the checkpoints. It needs memory for two models."""
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {name: t for name, t in named if t.is_floating_point()}
    shares = weights(len(checkpoints), decay)
    mean: dict[str, torch.Tensor] = {}
    seen = 0.0
    for checkpoint, share in zip(checkpoints, shares, strict=True):
        saving.load(checkpoint, model, None)
        seen += share
        for name, tensor in tensors.items():
            if name in mean:
                mean[name].lerp_(tensor, share / seen)
            else:
                mean[name] = tensor.clone()
    for name, tensor in tensors.items():
        tensor.copy_(mean[name])
