"""Accumulates sums over the activations of a dense model while it runs, from which statistics are made.

Letters: T real tokens of a batch, n numbers per token. Sums are float64 and counts are integers, so that
batching changes nothing but the rounding of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from upcycle.families import Stack

_ELEMENTS = 1 << 22  # the most to sum at once
MOST = 2**31 - 1  # the maximum number of tokens: what an int32 count holds
DTYPES = {"count": torch.int64, "co_activation": torch.int32}  # dtypes of the sums; the others are float64


class Observer:
    """Sums over the inputs of the watched matrices of `model`, named POSITION.STACK.LAYER.NAME."""

    def __init__(
        self,
        model: PreTrainedModel,
        stacks: Sequence[Stack],
        *,
        positions: Sequence[str],
        names: Sequence[str],
        threshold: float,
    ) -> None:
        self._base, self._threshold = model.base_model, threshold
        device = torch.device("cpu") if model.device.type == "mps" else model.device  # mps has no float64
        self.sums: dict[str, Tensor] = {}
        self.tokens = {stack.name: 0 for stack in stacks}  # tokens that a block of each stack has seen
        self._stack_of: dict[str, str] = {}
        self._watched: dict[str, nn.Module] = {}
        self._real: Mapping[str, Tensor | None] = {}
        self._seen: dict[str, int] = {}
        self._gradients = "gradient" in names
        for stack in stacks:
            for i in range(stack.count):
                for position in positions:
                    found = self._place(stack, position, i)
                    if found is None:
                        continue
                    key = f"{position}.{stack.name}.{i}"
                    self._watched[key], n = found
                    self._stack_of[key] = stack.name
                    for name in names:
                        pairs = name == "co_activation"
                        if not pairs or position == "neurons":
                            shape, dtype = (n, n) if pairs else (n,), DTYPES.get(name, torch.float64)
                            self.sums[f"{key}.{name}"] = torch.zeros(shape, dtype=dtype, device=device)

    def _place(self, stack: Stack, position: str, i: int) -> tuple[nn.Module, int] | None:
        """Return the module whose input is watched and the input's size; None if the blocks have none."""
        if position == "channels":
            return self._base.get_submodule(stack.module.format(i=i)), stack.hidden
        if position == "neurons":
            return self._base.get_submodule(stack.down.format(i=i)), stack.width
        for path in stack.heads:
            owner, _, last = path.format(i=i).rpartition(".")
            parent, _, name = owner.rpartition(".")
            if getattr(self._base.get_submodule(parent), name, None) is not None:
                module: Any = self._base.get_submodule(f"{owner}.{last}")
                size = module.in_features if hasattr(module, "in_features") else module.nx  # nx: Conv1D
                return module, int(size)
        return None

    @contextmanager
    def watching(self, real: Mapping[str, Tensor | None]) -> Iterator[None]:
        """Watch one forward pass, and the backward pass if gradients are collected.

        `real` [B, L] says for each stack which tokens count; None: all. After an error inside the block, the
        sums are invalid.
        """
        self._real = {name: None if r is None else r.flatten().bool() for name, r in real.items()}
        hooks = [
            module.register_forward_pre_hook(partial(self._see, key)) for key, module in self._watched.items()
        ]
        self._seen = dict.fromkeys(self.tokens, 0)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for stack, count in self._seen.items():
            self.tokens[stack] += count

    def _see(self, key: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x, *rest = args
        values = x.detach()
        self._add(key, values)
        if not self._gradients:
            return None
        # Use a separate tensor, so that its gradient comes back through this module alone. The first watched
        # tensor starts the graph.
        own = x.view_as(x) if x.requires_grad else values.requires_grad_()
        own.register_hook(partial(self._add_gradient, key, values.detach()))
        return (own, *rest)

    def _rows(self, key: str, x: Tensor) -> Tensor:
        """Return the real tokens, [T, n]."""
        rows, real = x.reshape(-1, x.shape[-1]), self._real.get(self._stack_of[key])
        return rows if real is None else rows[real]

    def _pieces(self, rows: Tensor) -> tuple[Tensor, ...]:
        home = next(iter(self.sums.values())).device
        return rows.to(home).split(max(1, _ELEMENTS // rows.shape[-1]))

    def _add(self, key: str, x: Tensor) -> None:
        rows = self._rows(key, x)
        self._seen[self._stack_of[key]] = len(rows)
        for piece in self._pieces(rows):
            for name, summed in _SUMS.items():
                if (total := self.sums.get(f"{key}.{name}")) is not None:
                    total += summed(piece, self._threshold)

    def _add_gradient(self, key: str, x: Tensor, gradient: Tensor) -> None:
        total = self.sums[f"{key}.gradient"]
        rows = (self._pieces(self._rows(key, t)) for t in (x, gradient))
        for a, b in zip(*rows, strict=True):
            total += (a.double() * b.double()).abs().sum(0)


def _pairs(piece: Tensor, threshold: float) -> Tensor:
    """Count the tokens with both of two numbers above the threshold: [T, n] to int32 [n, n].

    A piece has at most 2^22 tokens, so that float32 counts exactly.
    """
    on = (piece > threshold).float()
    return (on.T @ on).to(torch.int32)


_SUMS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "l1": lambda piece, _: piece.abs().sum(0, dtype=torch.float64),
    "l2": lambda piece, _: piece.double().square().sum(0),
    "count": lambda piece, threshold: (piece > threshold).sum(0),
    "co_activation": _pairs,
}


def means(name: str, total: Tensor, tokens: int) -> Tensor:
    """Return a statistic from its sum over `tokens`, float32."""
    found = total.double() / tokens
    return (found.sqrt() if name == "l2" else found).float()
