"""Muon over stacked and sharded matrices, and AdamW for the other parameters, as one torch optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim.adamw import adamw

from upcycle.training import gradients
from upcycle.training.gradients import local
from upcycle.training.optimizers._orthogonal import factor, orthogonal
from upcycle.training.roles import Role


class Muon(torch.optim.Optimizer):
    """Updates hidden matrices along an orthogonalised momentum, and everything else as AdamW does.

    Every matrix is updated by itself: each expert of a stack, and a gate apart from what it gates. If
    `found_inf` [] is not zero, a step changes nothing, and the host does not learn of it.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        *,
        momentum: float,
        nesterov: bool,
        steps: int,
        adjust: str,
        dtype: torch.dtype,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        given = [dict(group) for group in groups]
        self.roles: dict[Tensor, Role] = {}
        for group in given:
            self.roles |= dict.fromkeys(group["params"], group.pop("role", Role()))
        self.momentum, self.nesterov, self.iterations = momentum, nesterov, steps
        self.adjust, self.dtype, self.betas, self.eps = adjust, dtype, betas, eps
        # With `fused`, torch puts a step that it reads back on the parameter's device.
        super().__init__(given, {"lr": 0.0, "weight_decay": 0.0, "fused": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        stop: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            for parameter in members:
                if not self.state[parameter]:
                    self.state[parameter] = self.begun(parameter)
            if members and self.roles[members[0]].hidden:
                for parameter in members:
                    self._turn(parameter, group, stop)
            elif members:
                self._adam(members, group, stop)

    def begun(self, parameter: Tensor) -> dict[str, Any]:
        """Return the state of a parameter before its first update."""
        names = ("momentum_buffer",) if self.roles[parameter].hidden else ("exp_avg", "exp_avg_sq")
        return self.state_of(parameter, 0, {name: torch.zeros_like(parameter) for name in names})

    def state_of(self, parameter: Tensor, step: int, moments: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the state of a parameter after `step` updates, with those of the moments that it has."""
        if self.roles[parameter].hidden:
            return {"momentum_buffer": moments["momentum_buffer"]}
        own = {name: moments[name] for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.full((), float(step), device=parameter.device), **own}

    def _adam(self, members: list[Tensor], group: Mapping[str, Any], stop: Tensor | None) -> None:
        states = [self.state[parameter] for parameter in members]
        adamw(
            members,
            [p.grad for p in members if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=stop,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.eps,
            maximize=False,
        )

    def _turn(self, parameter: Tensor, group: Mapping[str, Any], stop: Tensor | None) -> None:
        """Update hidden matrices (torch.optim.Muon's arithmetic)."""
        gradient, own = gradients.of(parameter), local(self.state[parameter]["momentum_buffer"])
        go = gradient.new_ones(()) if stop is None else (stop == 0).to(gradient.dtype)
        if stop is not None:
            gradient = gradient.where(stop == 0, 0.0)
        own.lerp_(gradient, (1 - self.momentum) * go)
        update = gradient.lerp(own, self.momentum) if self.nesterov else own
        turned = self._orthogonal(parameter, update)
        value = local(parameter)
        value.mul_(1 - group["lr"] * group["weight_decay"] * go)
        by = group["lr"] * self._factor(parameter)
        value.addcmul_(turned.to(value.dtype), go * -by)

    def _factor(self, parameter: Tensor) -> float:
        """Return the factor on the update of each matrix, which goes by the shape of its map [out, in]."""
        role = self.roles[parameter]
        rows, columns = parameter.shape[-2] // role.matrices, parameter.shape[-1]
        return factor(*((columns, rows) if role.transposed else (rows, columns)), self.adjust)

    def _orthogonal(self, parameter: Tensor, update: Tensor) -> Tensor:
        """Return this rank's part of the orthogonalised update.

        Ranks that hold whole experts orthogonalise those. Others exchange parts until each holds whole
        experts, or all of a plain matrix.
        """
        role = self.roles[parameter]
        if not isinstance(parameter, DTensor) or _whole_experts(parameter, role):
            return self._each(update, role)
        mesh, placements = parameter.device_mesh, parameter.placements
        shared = DTensor.from_local(
            update, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        whole = [
            Shard(0) if role.stacked and not placement.is_replicate() else Replicate()
            for placement in placements
        ]
        there = shared.redistribute(placements=whole)
        made = DTensor.from_local(
            self._each(there.to_local(), role),
            mesh,
            whole,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return made.redistribute(placements=placements).to_local()

    def _each(self, stack: Tensor, role: Role) -> Tensor:
        """Orthogonalise every matrix of [..., m, n]."""
        rows, columns = stack.shape[-2] // role.matrices, stack.shape[-1]
        apart = stack.reshape(-1, rows, columns) if role.matrices > 1 or stack.ndim > 2 else stack
        return orthogonal(apart, self.iterations, self.dtype).reshape(stack.shape)


def _whole_experts(parameter: DTensor, role: Role) -> bool:
    """Return whether every rank holds whole matrices."""
    cuts = [getattr(placement, "dim", None) for placement in parameter.placements]
    return all(cut is None or (role.stacked and cut == 0) for cut in cuts)
