"""AdamW whose moments are stored in 8 bits, block by block, with torchao's quantisation.

The codes and scales of a moment are plain tensors that are cut as the parameter is. A block lies within the
last axis, so any other axis may be cut among ranks, and another layout reads the same numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torchao.optim import quant_utils

from upcycle.training import gradients
from upcycle.training.gradients import local
from upcycle.training.optimizers._at_once import CHUNK
from upcycle.training.optimizers._blocks import block_of

_MOMENTS = ("exp_avg", "exp_avg_sq")
_CODES, _SCALES = "{}_codes", "{}_scales"


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Dettmers et al., ICLR 2022, section 2: block-wise quantisation with a dynamic map).

    If `found_inf` [] is not zero, a step changes nothing, and the host does not learn of it.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self, groups: Iterable[Mapping[str, Any]], *, betas: tuple[float, float], eps: float, least: int
    ) -> None:
        self.betas, self.eps, self.least = betas, eps, least
        self._numbers: dict[tuple[str, torch.device], Tensor] = {}
        # With `fused`, torch puts a step that it reads back on the parameter's device.
        super().__init__([dict(group) for group in groups], {"lr": 0.0, "weight_decay": 0.0, "fused": True})
        self.register_load_state_dict_post_hook(_as_codes)

    def begun(self, parameter: Tensor) -> dict[str, Any]:
        """Return the state of a parameter before its first update."""
        state: dict[str, Any] = {"step": torch.zeros((), device=parameter.device)}
        block = block_of(parameter.shape, self.least)
        for moment in _MOMENTS:
            if block is None:
                state[moment] = torch.zeros_like(parameter)
            else:
                zero = _numbers(moment).index(0.0)
                state[_CODES.format(moment)] = _like(parameter, 1, zero, torch.uint8)
                state[_SCALES.format(moment)] = _like(parameter, block, 0.0, parameter.dtype)
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        stop: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                if not self.state[parameter]:
                    self.state[parameter] = self.begun(parameter)
                self._update(parameter, group, stop)

    def _update(self, parameter: Tensor, group: Mapping[str, Any], stop: Tensor | None) -> None:
        state = {name: local(tensor) for name, tensor in self.state[parameter].items()}
        state["step"] += 1.0 if stop is None else (stop == 0).to(state["step"].dtype)
        value, gradient = local(parameter), gradients.of(parameter)
        if not value.ndim:
            self._part(value, gradient, state, group, stop)
            return
        rows = max(1, CHUNK // max(1, math.prod(value.shape[1:])))
        for first in range(0, len(value), rows):
            part = slice(first, first + rows)
            own = {name: t if name == "step" else t[part] for name, t in state.items()}
            self._part(value[part], gradient[part], own, group, stop)

    def _part(
        self,
        value: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
        stop: Tensor | None,
    ) -> None:
        """Update some rows of a parameter."""
        wide, step, (beta1, beta2) = gradient.float(), state["step"], self.betas
        mean = self._read(state, "exp_avg").lerp(wide, 1 - beta1)
        square = self._read(state, "exp_avg_sq").lerp(wide.square(), 1 - beta2)
        root = square.sqrt() / (1 - beta2**step).sqrt() + self.eps
        kept = value.float() * (1 - group["lr"] * group["weight_decay"])
        made = kept - group["lr"] * (mean / (1 - beta1**step)) / root
        _put(value, made, stop)
        for moment, whole in zip(_MOMENTS, (mean, square), strict=True):
            self._write(state, moment, whole, stop)

    def _read(self, state: Mapping[str, Tensor], moment: str) -> Tensor:
        """Return a moment in float32."""
        if moment in state:
            return state[moment].float()
        codes, scales = state[_CODES.format(moment)], state[_SCALES.format(moment)]
        if not codes.numel():
            return codes.float()
        numbers = self._map(moment, codes.device)
        return quant_utils.dequant_with_qmap(codes.contiguous(), numbers, scales.float().flatten())

    def _write(self, state: Mapping[str, Tensor], moment: str, whole: Tensor, stop: Tensor | None) -> None:
        """Store a moment, unless `stop`."""
        if moment in state:
            _put(state[moment], whole, stop)
            return
        codes, scales = state[_CODES.format(moment)], state[_SCALES.format(moment)]
        if not codes.numel():
            return
        scaled, found = quant_utils.scale_tensor(whole.contiguous(), codes.numel() // scales.numel())
        _put(codes, quant_utils.quantize_8bit_with_qmap(scaled, self._map(moment, codes.device)), stop)
        _put(scales, found.view(scales.shape), stop)

    def _map(self, moment: str, device: torch.device) -> Tensor:
        """Return the numbers that the codes of a moment stand for, on the device."""
        if (moment, device) not in self._numbers:
            self._numbers[moment, device] = torch.tensor(_numbers(moment), device=device)
        return self._numbers[moment, device]


def _put(into: Tensor, new: Tensor, stop: Tensor | None) -> None:
    into.copy_(new if stop is None else torch.where(stop == 0, new, into))


@functools.cache
def _numbers(moment: str) -> tuple[float, ...]:
    """Return the numbers that the 256 codes of a moment stand for, in order; squares have no sign."""
    with unset_fake_temporarily():  # a dry run has tensors without data
        return tuple(quant_utils.create_dynamic_map(signed=moment == "exp_avg"))


def _like(parameter: Tensor, block: int, fill: float, dtype: torch.dtype) -> Tensor:
    """Return a tensor cut as the parameter is, with one number for each `block` along the last axis."""

    def shaped(whole: Sequence[int]) -> list[int]:
        return [*whole[:-1], whole[-1] // block]

    own = torch.full(shaped(local(parameter).shape), fill, dtype=dtype, device=parameter.device)
    if not isinstance(parameter, DTensor):
        return own
    shape = shaped(parameter.shape)
    strides = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
    return DTensor.from_local(
        own,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=strides,
    )


def _as_codes(optimizer: torch.optim.Optimizer) -> None:
    """Turn codes into whole numbers again: torch gives a state that it reads the type of the parameter."""
    for state in optimizer.state.values():
        for name in map(_CODES.format, _MOMENTS):
            if name in state:
                state[name] = state[name].to(torch.uint8)
