"""AdamW (Loshchilov and Hutter, ICLR 2019), torch's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from upcycle.settings import AtLeast, Within
from upcycle.training.optimizers import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with weight decay that does not pass through the moments."""

    summary = "Adam with decoupled weight decay"

    beta1: Annotated[float, Within("[0, 1)")] = 0.9  # decay of the mean of gradients
    beta2: Annotated[float, Within("[0, 1)")] = 0.95  # decay of the mean of their squares
    eps: Annotated[float, AtLeast(0)] = 1e-8  # added to the denominator

    @property
    def moments(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def make(self, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(
            [dict(group) for group in groups],
            lr=0.0,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )

    def state(self, parameter: Tensor, step: int, moments: Mapping[str, Tensor]) -> dict[str, Any]:
        import torch

        return {"step": torch.full((), float(step), device=parameter.device), **moments}

    def late_step(self, worked: float, idle: float) -> float:
        from upcycle.training.optimizers._late import largest_late_step

        return largest_late_step(worked, idle, beta1=self.beta1, beta2=self.beta2)


optimizer = AdamW
