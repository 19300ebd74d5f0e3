"""Trains a part of a model and keeps the rest as it is, to the bit.

A parameter that is not trained has no gradient, no state of the optimizer and, under FSDP, no reduction. Of
stacked experts some can be trained: the gradients of the others are set to zero, and after each update they
get back the values that they had. The optimizer's state covers the whole stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from upcycle.hf import distributing
from upcycle.training.anatomy import Members
from upcycle.training.gradients import local


@dataclass(kw_only=True)
class KeptExperts:
    """The experts of a model's stacks that are not trained, on this rank."""

    rows: Mapping[str, tuple[slice, ...]]  # by parameter: places on the first axis of this rank's part
    parameters: Mapping[str, nn.Parameter]
    values: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)  # what belongs there

    def remember(self) -> None:
        """Note the values that these experts have now."""
        for name, places in self.rows.items():
            own = local(self.parameters[name]).detach()
            self.values[name] = tuple(own[place].clone() for place in places)

    @torch.no_grad()
    def clear(self, grads: Mapping[str, Tensor]) -> None:
        """Set the gradients of these experts to zero; `grads` are those of parameters by name."""
        for name, places in self.rows.items():
            if name in grads:
                for place in places:
                    local(grads[name])[place].zero_()

    @torch.no_grad()
    def put_back(self) -> None:
        """Give these experts the values that were noted."""
        for name, places in self.rows.items():
            for place, value in zip(places, self.values[name], strict=True):
                local(self.parameters[name])[place].copy_(value)


def freeze(model: nn.Module, trained: Members, counts: Mapping[str, int]) -> KeptExperts | None:
    """Let only `trained` be trained from now on; return the experts that stay within stacks.

    `counts` are the experts of each stacked parameter. Optimizers that were made before are of no use
    afterwards.
    """
    distributing.put_shards_back(model)
    rows: dict[str, tuple[slice, ...]] = {}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name in counts:
            parameter.requires_grad_(name in trained)
            if name in trained and len(trained[name]) < counts[name]:
                rows[name] = _places(parameter, trained[name])
    distributing.note_trained(model)
    if not rows:
        return None
    kept = KeptExperts(rows=rows, parameters={name: parameters[name] for name in rows})
    kept.remember()
    return kept


def _places(parameter: Tensor, trained: frozenset[int]) -> tuple[slice, ...]:
    """Return where the experts that are not `trained` lie in this rank's part of a stack."""
    first, here = 0, len(parameter)
    if isinstance(parameter, DTensor):
        with unset_fake_temporarily():  # in a dry run, too, places are numbers
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
        first, here = offset[0], shape[0]
    still = [e - first for e in range(first, first + here) if e not in trained]
    out: list[slice] = []
    for place in still:
        if out and out[-1].stop == place:
            out[-1] = slice(out[-1].start, place + 1)
        else:
            out.append(slice(place, place + 1))
    return tuple(out)
