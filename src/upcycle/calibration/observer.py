"""Accumulates sums over the activations of a dense model while it runs, from which statistics are made.

Letters: T real tokens of a batch, n numbers per token, D domains, S tokens of a sample. Sums are float64 and
counts are integers, so that batching changes nothing but the rounding of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from upcycle.calibration.markers import Markers
from upcycle.families import Stack
from upcycle.hf.body import Body
from upcycle.records.statistics import NEGATIVE, ONLY_AT, WIDE
from upcycle.tensors import rng

_ELEMENTS = 1 << 22  # the most to sum at once
MOST = 2**31 - 1  # the maximum number of tokens: what an int32 count holds
# dtypes of the sums; the others are float64
DTYPES = {
    "count": torch.int64,
    "co_activation": torch.int32,
    "co_marker": torch.int32,
    "sample": torch.float32,
}
TOKENS = "tokens"  # the sum TOKENS.STACK counts the tokens of each domain, positive and negative


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
        domains: int = 0,
        sample: int = 0,
        seed: int = 0,
        markers: Mapping[tuple[str, int], Markers] | None = None,
    ) -> None:
        self._base, self._threshold, self._seed = Body.of(model).module, threshold, seed
        sizes = {"mean": domains, NEGATIVE: domains, "sample": sample}
        device = torch.device("cpu") if model.device.type == "mps" else model.device  # mps has no float64
        self.sums: dict[str, Tensor] = {}
        self.tokens = {stack.name: 0 for stack in stacks}  # tokens that a block of each stack has seen
        self._stack_of: dict[str, str] = {}
        self._watched: dict[str, nn.Module] = {}
        self._real: Mapping[str, Tensor | None] = {}
        self._seen: dict[str, int] = {}
        self._gradients = "gradient" in names
        self._domain, self._negative = 0, False
        self._markers: dict[str, Markers] = {}
        for (stack_name, i), marker in (markers or {}).items():
            key = f"markers.{stack_name}.{i}"
            module = next(stack.module for stack in stacks if stack.name == stack_name).format(i=i)
            self._watched[key], self._stack_of[key] = self._base.get_submodule(module), stack_name
            self._markers[key] = marker
        for stack in stacks:
            if domains:
                self.sums[f"{TOKENS}.{stack.name}"] = torch.zeros(
                    2, domains, dtype=torch.int64, device=device
                )
            for i in stack.numbers:
                for position in positions:
                    found = self._place(stack, position, i)
                    if found is None:
                        continue
                    key = f"{position}.{stack.name}.{i}"
                    self._watched[key], n = found
                    self._stack_of[key] = stack.name
                    for name in names:
                        if ONLY_AT.get(name, position) == position:
                            shape = (sizes.get(name, n), n) if name in ONLY_AT else (n,)
                            dtype = DTYPES.get(name, torch.float64)
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
    def watching(
        self, real: Mapping[str, Tensor | None], domain: int | None = None, *, negative: bool = False
    ) -> Iterator[None]:
        """Watch one forward pass, and the backward pass if gradients are collected.

        `real` [B, L] says for each stack which tokens count; None: all. All tokens are of the domain numbered
        `domain`. Its negative prompts count for nothing but their own mean. After an error inside the block,
        the sums are invalid.
        """
        self._domain, self._negative = domain or 0, negative
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
            self.tokens[stack] += 0 if negative else count
            if (counts := self.sums.get(f"{TOKENS}.{stack}")) is not None:
                counts[int(negative), self._domain] += count

    def _see(self, key: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x, *rest = args
        values = x.detach()
        if (marker := self._markers.get(key)) is not None:
            self._mark(key, marker, values)
            return None
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

    def _pieces(self, rows: Tensor, width: int = 0) -> tuple[Tensor, ...]:
        home = next(iter(self.sums.values())).device
        return rows.to(home).split(max(1, _ELEMENTS // max(width, rows.shape[-1])))

    def _add(self, key: str, x: Tensor) -> None:
        rows = self._rows(key, x)
        self._seen[self._stack_of[key]] = len(rows)
        mean = self.sums.get(f"{key}.{NEGATIVE if self._negative else 'mean'}")
        for piece in self._pieces(rows):
            if mean is not None:
                mean[self._domain] += piece.sum(0, dtype=torch.float64)
            for name, summed in _SUMS.items() if not self._negative else ():
                if (total := self.sums.get(f"{key}.{name}")) is not None:
                    total += summed(piece, self._threshold)
        sample = self.sums.get(f"{key}.sample")
        if sample is not None and not self._negative:
            self._draw(sample, rows, self._stack_of[key])

    def _mark(self, key: str, marker: Markers, x: Tensor) -> None:
        """Count the pairs of neurons that are both among the most active of a token."""
        total = self.sums[f"neurons{key.removeprefix('markers')}.co_marker"]
        for piece in self._pieces(self._rows(key, x), marker.width) if not self._negative else ():
            total += _pairs(marker.of(piece), 0.5)

    def _draw(self, sample: Tensor, rows: Tensor, stack: str) -> None:
        """Put rows [T, H] into the sample [S, H], so that every token so far is in it with one probability.

        Token t of a stack takes the place floor(u (t + 1)) if there is one, u being number t of a stream, and
        the first S tokens fill the places (Vitter 1985, algorithm R). So batches change nothing, and nothing
        but the sample has to be kept.
        """
        size, first = len(sample), self.tokens[stack]
        number = np.arange(first, first + len(rows))
        drawn = rng.uniforms(rng.key(self._seed, "sample", stack), first, first + len(rows))
        place = np.where(number < size, number, (drawn.astype(np.float64) * (number + 1)).astype(np.int64))
        last = {int(at): i for i, at in enumerate(place) if at < size}  # a later token takes a place over
        if last:
            sample[list(last)] = rows[list(last.values())].to(sample)

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
    "second_moment": lambda piece, _: piece.double().T @ piece.double(),
}


def means(name: str, total: Tensor, tokens: int | Tensor) -> Tensor:
    """Return a statistic [...] from its sum over `tokens`: float32, or float64 if equations need that.

    That of a domain without tokens is zero.
    """
    if name == "sample":
        return total
    found = total.double() / (tokens.clamp(min=1)[:, None] if isinstance(tokens, Tensor) else tokens)
    return found if name in WIDE else (found.sqrt() if name == "l2" else found).float()
