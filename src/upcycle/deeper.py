"""Depth tiling: the dense model with every block repeated, the dense baseline of Sparse Upcycling (figure 5).

Each block of a stack stands several times in a row, as Rae et al. (2021) grow models; the result is a dense
model of the same class, deeper, that has to be trained on.
"""

from __future__ import annotations

from typing import Any

from upcycle.errors import UpcycleError
from upcycle.families import Config
from upcycle.lazy import Lazy
from upcycle.natives import Native
from upcycle.source import Dense
from upcycle.upcycled import Layout

TARGET = "depth_tiled"
_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "max_window_layers")


def target(dense: Dense) -> Native:
    """The dense class itself."""
    return Native(
        model_type=dense.family.model_type,
        architecture=dense.architecture,
        summary="the dense class, deeper",
        layout=Layout(),
        router="",
        fields=(),
        renormalizes="optional",
        upcycled=True,
    )


def config(dense: Dense, times: int) -> Config:
    """config.json of the deeper model: counts of blocks times `times`, entries of blocks repeated."""
    if times < 2:
        raise UpcycleError(f"moe.depth = {times}; a deeper model repeats its blocks 2 times or more")
    layers = max(stack.count for stack in dense.stacks)

    def changed(key: str, value: Any) -> Any:
        if key in _COUNTS and isinstance(value, int):
            return value * times
        if isinstance(value, list) and len(value) == layers:
            return [item for item in value for _ in range(times)]
        return value

    return {key: changed(key, value) for key, value in dense.checkpoint.config.items()}


def tensors(dense: Dense, times: int) -> dict[str, Lazy]:
    """Every tensor of the deeper model: block j is block j // `times` of the dense one."""
    wanted = dense.family.shapes(dense.family.config(config(dense, times)))
    out = dict(dense.tensors)
    for stack in dense.stacks:
        prefix = stack.path.partition("{i}")[0]
        blocks: dict[int, dict[str, Lazy]] = {}
        for name in [name for name in out if name.startswith(prefix)]:
            number, _, rest = name.removeprefix(prefix).partition(".")
            if number.isdigit():
                blocks.setdefault(int(number), {})[rest] = out.pop(name)
        for j in range(stack.count * times):
            for rest, tensor in blocks[j // times].items():
                if (name := f"{prefix}{j}.{rest}") in wanted:  # T5 has its position biases in block 0 alone
                    out[name] = tensor
    if missing := wanted.keys() - out.keys():
        raise AssertionError(f"a deeper {dense.family.model_type} lacks {sorted(missing)[:3]}")
    return out
