"""Muon (Jordan et al. 2024; Liu et al. 2025, Muon is Scalable for LLM Training) beside AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from upcycle.settings import AtLeast, Within
from upcycle.training.optimizers import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from upcycle.training.roles import Role


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Updates each hidden matrix along the nearest orthogonal matrix to its momentum.

    Hidden matrices are those of linear layers and experts between the embeddings and the head. Each expert is
    a matrix of its own, and so is each half of a packed gate_up. AdamW updates the rest: embeddings, head,
    norms, biases, routers, convolutions. Packed queries, keys and values are one matrix.

    With `adjust = match_rms_adamw`, both take the schedule's rate and weight decay.
    """

    summary = "orthogonalised momentum for matrices and experts, AdamW for the rest"
    by_role: ClassVar[bool] = True
    not_foretold: ClassVar[str | None] = "exchanges the matrices that ranks share, and makes each orthogonal"

    momentum: Annotated[float, Within("[0, 1)")] = 0.95  # decay of the mean of gradients of hidden matrices
    nesterov: bool = True  # whether the update looks one gradient ahead of that mean
    # number of Newton-Schulz iterations that orthogonalise an update
    iterations: Annotated[int, AtLeast(1)] = 5
    # factor on the update of an m x n matrix: 0.2 sqrt(max(m, n)), so that its size is AdamW's (Liu et al.,
    # equation 4), or sqrt(max(1, m / n)) (Jordan)
    adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    # type of the products in the iterations; published runs take bfloat16
    products: Literal["bfloat16", "float32"] = "bfloat16"
    adam_rate: Annotated[float, AtLeast(0)] = 1.0  # factor on the learning rate of what AdamW updates
    beta1: Annotated[float, Within("[0, 1)")] = 0.9  # AdamW's decay of the mean of gradients
    beta2: Annotated[float, Within("[0, 1)")] = 0.95  # AdamW's decay of the mean of their squares
    eps: Annotated[float, AtLeast(0)] = 1e-8  # added to AdamW's denominator

    @property
    def moments(self) -> tuple[str, ...]:
        return ("momentum_buffer", "exp_avg", "exp_avg_sq")

    @property
    def copies(self) -> float:
        return 1.0  # hidden matrices are nearly all of a model that is large

    def state_bytes(self, width: int, *, outside: bool = False) -> float:
        """One moment in the blocks, of which hidden matrices are nearly all, and AdamW's two outside."""
        return (2 if outside else 1) * width

    def update_bytes(self, inside: Sequence[int], outside: Sequence[int], width: int) -> float:
        """A copy of the largest gradient, its mean with the momentum, and four such in the iterations."""
        products = 2 if self.products == "bfloat16" else 4
        return max(inside, default=0) * (2 * width + 4 * products)

    def rate(self, role: Role) -> float:
        return super().rate(role) * (1.0 if role.hidden else self.adam_rate)

    def make(self, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        import torch

        from upcycle.training.optimizers import _muon

        return _muon.Muon(
            groups,
            momentum=self.momentum,
            nesterov=self.nesterov,
            steps=self.iterations,
            adjust=self.adjust,
            dtype=getattr(torch, self.products),
            betas=(self.beta1, self.beta2),
            eps=self.eps,
        )

    def carried(
        self, made: torch.optim.Optimizer, parameter: Tensor, step: int, moments: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        from upcycle.training.optimizers import _muon

        assert isinstance(made, _muon.Muon)
        return made.state_of(parameter, step, moments)

    def begun(self, made: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
        from upcycle.training.optimizers import _muon

        assert isinstance(made, _muon.Muon)
        return made.begun(parameter)


optimizer = Muon
