"""Grouped matrix products that follow autocast, for our experts and for those of transformers.

torch's autocast does not know them, and transformers' own implementation computes in the type of the weights.
In mixed precision on one process these have float32: half as fast, and on a GPU one product for each expert,
between which the host waits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from upcycle.hf.parts import ALL_EXPERTS_FUNCTIONS
from upcycle.nn import autocast, kernels


def run(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Run rows [M, H] through their experts `index` [M, K] and sum with `weights` [M, K]: [M, H].

    `experts` is the module that transformers gives its implementations. Rows that are a multiple of 16 bytes
    in the type of the weights alone stay in that type.
    """
    dtype = None if isinstance(experts, View) else autocast.dtype(hidden.device.type)
    follows = dtype is not None and _fits(experts, dtype)
    seen = View(experts, dtype) if follows else experts
    out: Tensor = ALL_EXPERTS_FUNCTIONS[kernels.GROUPED](seen, hidden, index, weights)
    return out


def _fits(experts: Any, dtype: torch.dtype) -> bool:
    stacks = (p for p in experts._parameters.values() if p is not None and p.ndim == 3)
    return kernels.take_groups((stack.shape[-1] for stack in stacks), dtype.itemsize)


class View:
    """Experts as an implementation should see them in one forward pass.

    Their parameters are in autocast's `dtype`, if it is on. With `some_left`, implementations leave out rows
    with an index of E, as they do for experts of other ranks.
    """

    def __init__(self, experts: Any, dtype: torch.dtype | None, some_left: bool = False) -> None:
        self._experts = experts
        self._is_expert_parallel = some_left or experts._is_expert_parallel
        for name, parameter in experts._parameters.items():
            setattr(self, name, parameter if parameter is None or dtype is None else parameter.to(dtype))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)
