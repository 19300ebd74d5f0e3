"""Stochastic gradient descent with momentum (Polyak 1964; Nesterov 1983), torch's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from upcycle.errors import UpcycleError
from upcycle.settings import Within
from upcycle.training.optimizers import Optimizer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Updates weights along a running sum of gradients. Weight decay is part of the gradient, as in torch."""

    summary = "gradient descent with momentum"

    # decay of the running sum of gradients; 0: the gradient alone
    momentum: Annotated[float, Within("[0, 1)")] = 0.9
    nesterov: bool = False  # whether to use Nesterov's momentum

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise UpcycleError("optimizer.nesterov = true needs a momentum; set optimizer.momentum above 0")

    @property
    def moments(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def make(self, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        import torch
        from torch.distributed.tensor import DTensor

        from upcycle.training.optimizers._sgd import ShardedSGD

        sharded = any(isinstance(p, DTensor) for group in groups for p in group["params"])
        kind = ShardedSGD if sharded else torch.optim.SGD
        return kind(
            [dict(group) for group in groups],
            lr=0.0,
            momentum=self.momentum,
            nesterov=self.nesterov,
            fused=True,
        )


optimizer = SGD
