"""Drop path (stochastic depth, Huang et al. 2016): samples skip branches, more often in deeper blocks.

As in timm, each sample and branch is drawn by itself. Of N blocks, block i (from 0) drops each of its
branches with probability rate x i / (N - 1) and divides what stays by the probability to stay. This is done
with hooks on the modules whose output is added to the residual stream (`Trained.branches`), because few
classes of transformers support it. The hooks replace the rate that some models have in config.json. The draws
come from torch's own generator, whose state activation checkpointing restores before it recomputes a block.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel

from upcycle.errors import UpcycleError
from upcycle.families import Config, Family, _stacks
from upcycle.families._training import trained
from upcycle.hf.body import Body


def install(model: PreTrainedModel, family: Family, config: Config, rate: float) -> None:
    """Let the blocks of `model` drop branches in training: the first never, the last with `rate`.

    Raises `UpcycleError` if the blocks have no place for it.
    """
    known = trained(family, f"train.drop_path = {rate}")
    body = Body.of(model)
    stacks = known.stacks(config)
    blocks = [
        [path.format(i=i) for path in known.branches(config, _stacks.at(stacks, blocks, i))]
        for blocks in _stacks.lists_of(stacks)
        for i in range(len(body.blocks(blocks)))
    ]
    present = {name for name, _ in body.module.named_modules()}
    if rate and not all(block and present.issuperset(block) for block in blocks):
        raise UpcycleError(
            f"train.drop_path = {rate}: the blocks of {type(model).__name__} have no place where a branch "
            f"can be left out; take it out, or set it to 0"
        )
    with unset_fake_temporarily():  # in a dry run, too, the rates are numbers
        rates = torch.linspace(0, rate, len(blocks)).tolist()
    for block, own in zip(blocks, rates, strict=True):
        for module in (body.module.get_submodule(path) for path in block if path in present):
            if hasattr(module, "drop_prob"):
                setattr(module, "drop_prob", 0.0)  # noqa: B010
            if own:
                module.register_forward_hook(partial(_drop, own))


def _drop(rate: float, module: nn.Module, args: Any, output: Any) -> Any:
    """Drop samples from a branch's output, or from the first of its outputs, after its forward pass."""
    if not module.training:
        return output
    if isinstance(output, tuple):
        return (dropped(output[0], rate), *output[1:])
    return dropped(output, rate)


def dropped(branch: Tensor, rate: float) -> Tensor:
    """Set each sample of [B, ...] to zero with probability `rate`, and divide the others by 1 - rate."""
    kept = branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(1 - rate)
    return branch * (kept / (1 - rate))
