"""Answers what transformers' dispatch of tokens to experts asks of values, if tensors have none.

`AllToAllEP` reads in every layer how many tokens go to each rank of an expert-parallel group. In a world of
tensors without data, as many go to each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class EvenDispatch(TorchDispatchMode):
    """While it is on, the experts of `model` that ranks share out get as many tokens on each of `ep` ranks.

    Under tensor parallelism, the `tp` ranks that see the same tokens send a part of them each.
    """

    def __init__(self, model: nn.Module, *, ep: int, tp: int) -> None:
        super().__init__()
        self.ep, self.tp = ep, tp
        self.sizes: Iterator[int] = iter(())
        for module in model.modules():
            if getattr(module, "_is_expert_parallel", False):
                module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note how many pairs of tokens and experts a layer sends: to each rank, and then from each."""
        given = [*args, *kwargs.values()]
        index = next(t for t in given if torch.is_tensor(t) and not t.is_floating_point())
        pairs = -(-len(index) // self.tp) * index[0].numel()
        even = [pairs // self.ep + (rank < pairs % self.ep) for rank in range(self.ep)]
        self.sizes = iter([*even, *even])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented
        if func is aten._local_scalar_dense.default and (size := next(self.sizes, None)) is not None:
            return size
        if func is aten.bincount.default:  # its shape depends on values if there are more than `minlength`
            return args[0].new_zeros((kwargs or {}).get("minlength", 0) or args[2])
        return func(*args, **kwargs or {})
