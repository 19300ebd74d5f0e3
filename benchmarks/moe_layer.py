"""The time of the forward and backward pass of one MoE layer.

It is compared with the dense network of equal active FLOPs, the plain loop, the MoE block of transformers,
and the time of the layer's matrix products alone. All contenders run in the same process in rotating order,
and the figures are ratios within a round.

    python benchmarks/moe_layer.py --size small       # CPU
    python benchmarks/moe_layer.py --size large       # a GPU: T = 16,384, H = 1024, I = 4096, bfloat16
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import machine
from upcycle.nn.moe import MoE
from upcycle.nn.shape import Shape

EXPERTS, TOP_K = 8, 2
SIZES: dict[str, dict[str, Any]] = {
    "small": {"rows": 4, "length": 512, "hidden": 256, "width": 1024, "dtype": "float32"},
    "large": {"rows": 8, "length": 2048, "hidden": 1024, "width": 4096, "dtype": "bfloat16"},
}


def config(size: dict[str, Any], width: int, implementation: str) -> MixtralConfig:
    """Return a config for the blocks of transformers, which also names our implementation of experts."""
    made = MixtralConfig(
        hidden_size=size["hidden"], intermediate_size=width, num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K, hidden_act="silu",
    )  # fmt: skip
    made._experts_implementation = implementation
    made.mlp_bias = False
    return made


def ours(size: dict[str, Any], implementation: str, **router: Any) -> MoE:
    """Make an `upcycle.nn.MoE` with the given router."""
    shape = Shape(
        stack="layers", layers=(0,), module="", num_experts=EXPERTS, top_k=TOP_K, hidden_size=size["hidden"],
        intermediate_size=size["width"], activation="silu", gated=True, bias=False, causal=False,
        router=router,
    )  # fmt: skip
    layer = MoE(config(size, size["width"], implementation), shape)
    layer.reset_parameters(0.02)
    return layer


def theirs(size: dict[str, Any], implementation: str) -> nn.Module:
    """Make the block of transformers of the same shape."""
    block = MixtralSparseMoeBlock(config(size, size["width"], implementation))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def layers(size: dict[str, Any]) -> dict[str, nn.Module]:
    """Make all contenders. Each does the work of 2 experts per token."""
    return {
        "dense": LlamaMLP(config(size, TOP_K * size["width"], "eager")),
        "top_k": ours(size, "grouped_mm", name="top_k"),
        "top_k loop": ours(size, "eager", name="top_k"),
        "expert_choice": ours(size, "grouped_mm", name="expert_choice", capacity_factor=float(TOP_K)),
        "expert_choice loop": ours(size, "eager", name="expert_choice", capacity_factor=float(TOP_K)),
        "transformers": theirs(size, "grouped_mm"),
        "transformers loop": theirs(size, "eager"),
    }


def step(layer: nn.Module, hidden: torch.Tensor) -> Callable[[], None]:
    """Return a forward and backward pass with gradients of the input and the weights."""

    def run() -> None:
        given = hidden.clone().requires_grad_()
        out = layer(given)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        layer.zero_grad(set_to_none=True)

    return run


def products(size: dict[str, Any], dtype: torch.dtype) -> Callable[[], None]:
    """Return the lower bound: the matrix products of the layer alone.

    They are done as one dense product each, three times (forward and both gradients). Weights are read once,
    so that the bound is on arithmetic, not on memory.
    """
    tokens, hidden, width = size["rows"] * size["length"], size["hidden"], size["width"]
    where: Any = {"device": machine.device(), "dtype": dtype}
    rows = torch.randn(TOP_K * tokens, hidden, **where)
    up, down = torch.randn(hidden, 2 * width, **where), torch.randn(width, hidden, **where)
    inner = torch.randn(TOP_K * tokens, width, **where)

    def run() -> None:
        for _ in range(3):
            rows @ up
            inner @ down

    return run


def main() -> None:
    """Measure all contenders and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, help="where to write the result (default: standard output)")
    options = parser.parse_args()
    size = SIZES[options.size]
    dtype = getattr(torch, size["dtype"])
    torch.manual_seed(0)
    hidden = torch.randn(size["rows"], size["length"], size["hidden"]).to(machine.device(), dtype)
    made = {name: layer.to(machine.device(), dtype).train() for name, layer in layers(size).items()}
    contenders = {name: step(layer, hidden) for name, layer in made.items()}
    contenders["products"] = products(size, dtype)
    seconds = machine.in_turn(contenders, options.rounds)
    tokens = size["rows"] * size["length"]
    flops = 3 * 2 * tokens * TOP_K * 3 * size["hidden"] * size["width"]
    pairs = [
        ("top_k", "dense"), ("top_k", "transformers"), ("top_k", "top_k loop"), ("top_k", "products"),
        ("top_k loop", "transformers loop"), ("expert_choice", "dense"), ("expert_choice", "transformers"),
        ("expert_choice", "expert_choice loop"), ("transformers", "dense"), ("dense", "products"),
    ]  # fmt: skip
    result = {
        "size": size,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "rounds": options.rounds,
        "device": machine.name(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "flops": flops,
        "gflops_per_s": {n: round(flops / statistics.median(s) / 1e9, 1) for n, s in seconds.items()},
        "time_ratios": {f"{a} / {b}": machine.ratio(seconds[a], seconds[b]) for a, b in pairs},
    }
    text = json.dumps(result, indent=2) + "\n"
    options.out.write_text(text) if options.out else sys.stdout.write(text)


if __name__ == "__main__":
    main()
