"""Adafactor (Shazeer and Stern, ICML 2018), torch's own. T5 and Sparse Upcycling train with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from upcycle.settings import AtLeast
from upcycle.training.optimizers import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Stores a matrix's second moment as one row and one column of numbers, and no first moment.

    The schedule's rate is relative: a step is as large as the rate, but at most 1 / sqrt(step), times the
    root mean square of the parameter (at least `least_scale`). Weight decay is decoupled.
    """

    summary = "second moments in rows and columns: a fraction of Adam's memory"

    weight_decay: Annotated[float, AtLeast(0)] = 0.0  # weight decay of matrices; see `optimizer.decays`
    decay: Annotated[float, AtLeast(0)] = 0.8  # c of beta2 = 1 - step^-c
    # the largest root mean square of an update, before the learning rate
    clip: Annotated[float, AtLeast(1)] = 1.0
    least_scale: Annotated[float, AtLeast(0)] = 1e-3  # least RMS of a parameter for its relative rate

    def make(self, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.Adafactor(
            [dict(group) for group in groups],
            lr=0.0,
            beta2_decay=-self.decay,
            eps=(None, self.least_scale),
            d=self.clip,
            foreach=False,
        )

    def idle(self, parameter: Tensor) -> dict[str, Any]:
        import torch

        shape, step = parameter.shape, torch.tensor(0.0)
        if parameter.ndim < 2:
            return {"step": step, "variance": torch.zeros_like(parameter)}
        rows, columns = (
            parameter.new_zeros((*shape[:-1], 1)),
            parameter.new_zeros((*shape[:-2], 1, shape[-1])),
        )
        return {"step": step, "row_var": rows, "col_var": columns}

    def cannot_shard(self, shape: Sequence[int], dims: Sequence[int]) -> str | None:
        return "its update needs the mean over whole parameters"


optimizer = Adafactor
