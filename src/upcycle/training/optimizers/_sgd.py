"""torch's SGD over the parts of sharded parameters that a rank holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from upcycle.training import gradients
from upcycle.training.gradients import local


class ShardedSGD(torch.optim.SGD):
    """SGD's fused kernel has no rule for sharded tensors, and takes a rank's parts one by one as well.

    So it can skip a step on the device (`found_inf`), as it does on one process.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            sgd(
                [local(p) for p in members],
                [gradients.of(p) for p in members],
                [self._mean(p) for p in members] if group["momentum"] else [],
                fused=True,
                found_inf=getattr(self, "found_inf", None),
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
            )

    def _mean(self, parameter: Tensor) -> Tensor | None:
        """Return this rank's part of the running sum of gradients."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return local(state["momentum_buffer"])
