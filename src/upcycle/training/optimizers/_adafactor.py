"""Adafactor over stacked and sharded matrices, with torch's arithmetic for each matrix by itself.

Ranks that share a matrix sum what its rows, columns and means need, for many parameters together. Letters: m
rows, n columns, M matrices above each other in one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from upcycle.training import gradients
from upcycle.training.gradients import local
from upcycle.training.optimizers._at_once import TOGETHER
from upcycle.training.roles import Role


@dataclass(frozen=True, kw_only=True)
class _Sum:
    """A sum over some axes of a rank's part of a parameter, which other ranks have parts of."""

    value: Tensor
    of: Tensor  # the parameter
    axes: Sequence[int]  # the axes of the parameter that are summed


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer and Stern 2018, algorithms 4 and 5) for every matrix by itself.

    Each expert of a stack has row and column statistics, a clipping and a relative rate of its own, and so
    has a gate apart from what it gates. If `found_inf` [] is not zero, a step changes nothing, and the host
    does not learn of it.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        *,
        decay: float,
        clip: float,
        least_scale: float,
        start_step: int,
    ) -> None:
        given = [dict(group) for group in groups]
        self.roles: dict[Tensor, Role] = {}
        for group in given:
            self.roles |= dict.fromkeys(group["params"], group.pop("role", Role()))
        self.decay, self.clip, self.least_scale = decay, clip, least_scale
        self.start_step = start_step
        self._halves: dict[Tensor, Tensor] = {}
        # With `fused`, torch puts a step that it reads back on the parameter's device.
        super().__init__(given, {"lr": 0.0, "weight_decay": 0.0, "fused": True})

    def begun(self, parameter: Tensor) -> dict[str, Any]:
        """Return the state of a parameter before its first update."""
        step = torch.zeros((), device=parameter.device)
        if not self._factored(parameter):
            return {"step": step, "variance": torch.zeros_like(parameter)}
        rows, columns = parameter.ndim - 2, parameter.ndim - 1
        return {
            "step": step,
            "row_var": _zeros(parameter, columns, 1),
            "col_var": _zeros(parameter, rows, self.roles[parameter].matrices),
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        stop: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for members in _batches([p for p in group["params"] if p.grad is not None]):
                self._update(members, group, stop)

    def _update(self, members: list[Tensor], group: Mapping[str, Any], stop: Tensor | None) -> None:
        """Update parameters of one role and one mesh."""
        given, go = {}, 1.0 if stop is None else (stop == 0).double()
        for p in members:
            if not self.state[p]:
                self.state[p] = self.begun(p)
            own = gradients.of(p)
            given[p] = own if stop is None else own.where(stop == 0, 0.0)
            self.state[p]["step"] += go
        scales = self._norms(members, {p: local(p) for p in members})
        self._accumulate(members, given, go)
        updates = self._directions(members, given)
        sizes = self._norms(members, updates)
        for p in members:
            step = self.state[p]["step"].double() + self.start_step
            rate = step.clamp(min=1).rsqrt().clamp(max=group["lr"])
            value, update = local(p), updates[p]
            if group["weight_decay"]:
                value.mul_(1 - group["lr"] * group["weight_decay"] * go)
            denominator = (sizes[p] / self.clip).clamp(min=1.0)
            by = scales[p].clamp(min=self.least_scale) * rate / denominator
            by = by if stop is None else by.where(stop == 0, 0.0)
            value.addcmul_(update, self._spread(p, -by).to(update.dtype))

    def _accumulate(self, members: list[Tensor], given: Mapping[Tensor, Tensor], go: Tensor | float) -> None:
        """Move the second moments towards the squares of these gradients."""
        factored = [p for p in members if self._factored(p)]
        sums = []
        for p in factored:
            g = given[p]
            rows = torch.linalg.vector_norm(g, dim=-1, keepdim=True).square_()
            sums += [_Sum(value=rows, of=p, axes=[p.ndim - 1])]
            sums += [_Sum(value=self._down(p, g), of=p, axes=[p.ndim - 2])]
        whole = iter(_together(sums))
        for p in members:
            state = self.state[p]
            step = state["step"].double() + self.start_step
            weight = (step.clamp(min=1) ** -self.decay * go).to(given[p].dtype)
            if self._factored(p):
                height = p.shape[-2] // self.roles[p].matrices
                local(state["row_var"]).lerp_(next(whole).div_(p.shape[-1]), weight)
                local(state["col_var"]).lerp_(next(whole).div_(height), weight)
            else:
                local(state["variance"]).lerp_(given[p].square(), weight)

    def _directions(self, members: list[Tensor], given: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Return the gradients over the roots of their second moments."""
        factored = [p for p in members if self._factored(p)]
        rows = {p: local(self.state[p]["row_var"]) for p in factored}
        sums = [_Sum(value=self._above(p, rows[p]), of=p, axes=[p.ndim - 2]) for p in factored]
        totals = dict(zip(factored, _together(sums), strict=True))
        out = {}
        for p in members:
            least = torch.finfo(p.dtype).eps
            if self._factored(p):
                height = p.shape[-2] // self.roles[p].matrices
                means = (totals[p] / height).clamp_(min=least)
                columns = local(self.state[p]["col_var"])
                variance = (rows[p] * self._beside(p, columns)).div_(self._beside(p, means))
            else:
                variance = local(self.state[p]["variance"]).clone()
            out[p] = variance.clamp_(min=least * least).rsqrt_().mul_(given[p])
        return out

    def _norms(self, members: list[Tensor], tensors: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Return the root mean square of every matrix or vector, in float64: [E, M] if stacked, else [M]."""
        sums = []
        for p in members:
            role, own = self.roles[p], tensors[p]
            first = 1 if role.stacked else 0
            axes = [*range(first, p.ndim)]
            if role.matrices > 1:
                squares = torch.linalg.vector_norm(own, dim=-1, keepdim=True).double().square_()
                value = self._above(p, squares)[..., 0]
            else:
                value = torch.linalg.vector_norm(own, dim=axes or None).double().square_()[..., None]
            sums.append(_Sum(value=value, of=p, axes=axes))
        counts = [
            math.prod(p.shape[1 if self.roles[p].stacked else 0 :]) // self.roles[p].matrices for p in members
        ]
        return {
            p: whole.sqrt_() / count**0.5
            for p, whole, count in zip(members, _together(sums), counts, strict=True)
        }

    def _factored(self, parameter: Tensor) -> bool:
        """Return whether a parameter is matrices; biases of experts [E, I] are vectors."""
        return parameter.ndim - (1 if self.roles[parameter].stacked else 0) > 1

    def _spread(self, p: Tensor, values: Tensor) -> Tensor:
        """Return values of every matrix or vector, [E, M] or [M], in a shape that fits the parameter."""
        role = self.roles[p]
        if role.matrices > 1:
            return self._beside(p, values[..., None])
        return values.reshape((*values.shape[:-1], *[1] * (p.ndim - (1 if role.stacked else 0))))

    def _down(self, p: Tensor, matrix: Tensor) -> Tensor:
        """Return the sums of squares of [..., m, n] down the columns of each of M matrices: [..., M, n]."""
        if self.roles[p].matrices == 1:
            return torch.linalg.vector_norm(matrix, dim=-2, keepdim=True).square_()
        return self._above(p, matrix.square())

    def _above(self, p: Tensor, rows: Tensor) -> Tensor:
        """Return the sums of [..., m, k] over the rows of each of M matrices: [..., M, k]."""
        if self.roles[p].matrices == 1:
            return rows.sum(-2, keepdim=True)
        return self._member(p).to(rows.dtype).mT @ rows

    def _beside(self, p: Tensor, values: Tensor) -> Tensor:
        """Return values of M matrices [..., M, k] beside each row: [..., m, k], or [..., 1, k] if M is 1."""
        return values if self.roles[p].matrices == 1 else self._member(p).to(values.dtype) @ values

    def _member(self, p: Tensor) -> Tensor:
        """Return which of M matrices each row of this rank's part belongs to, as zeros and ones [m, M]."""
        if p not in self._halves:
            count = self.roles[p].matrices
            numbers = torch.arange(p.shape[-2], device=p.device) // (p.shape[-2] // count)
            if isinstance(p, DTensor):
                cuts = [_along(cut, p.ndim - 2) for cut in p.placements]
                everywhere = [Replicate()] * len(cuts)
                shared = DTensor.from_local(numbers, p.device_mesh, everywhere, run_check=False)
                numbers = shared.redistribute(placements=cuts).to_local()
            self._halves[p] = (numbers[:, None] == torch.arange(count, device=p.device)).float()
        return self._halves[p]


def _batches(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield parameters that are updated together, in order; every rank gets the same ones.

    A rank holds the updates of those together in memory, beside the weights.
    """
    batch: list[Tensor] = []
    room = TOGETHER
    for parameter in parameters:
        ranks = parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1
        size = parameter.numel() // ranks
        if batch and size > room:
            yield batch
            batch, room = [], TOGETHER
        batch.append(parameter)
        room -= size
    if batch:
        yield batch


def _along(cut: Any, axis: int) -> Any:
    """Return how a vector along `axis` of a tensor is cut; a packed axis is cut in each of its parts."""
    if getattr(cut, "dim", None) != axis:
        return Replicate()
    return type(cut)(0, split_factor=cut.split_factor) if hasattr(cut, "split_factor") else Shard(0)


def _zeros(parameter: Tensor, axis: int, length: int) -> Tensor:
    """Return zeros like a parameter, of `length` along `axis`, where every rank has all of them."""
    shape = [*parameter.shape]
    shape[axis] = length
    if not isinstance(parameter, DTensor):
        return parameter.new_zeros(shape)
    own = [*parameter.to_local().shape]
    own[axis] = length
    cuts = [Replicate() if getattr(cut, "dim", None) == axis else cut for cut in parameter.placements]
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    return DTensor.from_local(
        parameter.to_local().new_zeros(own),
        parameter.device_mesh,
        cuts,
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(strides),
    )


def _together(sums: Sequence[_Sum]) -> list[Tensor]:
    """Return the sums over all ranks that share the axes summed, with one collective for each mesh axis.

    The parameters are cut in the same way, so they are on one mesh.
    """
    out = [one.value for one in sums]
    sharded = next((one.of for one in sums if isinstance(one.of, DTensor)), None)
    if sharded is None:
        return out
    for axis, cut in enumerate(sharded.placements):
        places = [place for place, one in enumerate(sums) if getattr(cut, "dim", None) in one.axes]
        if not places:
            continue
        flat = torch.cat([out[place].flatten() for place in places])
        dist.all_reduce(flat, group=sharded.device_mesh.get_group(axis))
        parts = flat.split([out[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            out[place] = part.view(out[place].shape)
    return out
