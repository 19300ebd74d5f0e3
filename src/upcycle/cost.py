"""The plan: what a blueprint costs in parameters, FLOPs, bytes and memory, before anything is written."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upcycle import advice
from upcycle.blueprints import Blueprint, blueprint
from upcycle.checkpoint import CHUNK, Checkpoint
from upcycle.families import Config
from upcycle.hub import peek
from upcycle.recipe import Recipe
from upcycle.shards import DEFAULT_SHARD, lay_out
from upcycle.source import Dense

BASE_MEMORY = 90_000_000  # bytes of an interpreter with numpy and what a conversion imports
BLOCK_MEMORY = 32 << 20  # bytes that computing one block of a tensor takes at most, beside whole tensors


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be built. FLOPs are those of a forward pass per token in matrix products (2 a weight).

    Attention scores, which grow with the context, and norms are not counted; the embedding is a look-up.
    """

    source: str
    family: str
    target: str
    num_layers: int
    moe_layers: list[int]
    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int
    dense_parameters: int
    total_parameters: int
    active_parameters: int
    dense_flops_per_token: int
    flops_per_token: int
    output_bytes: int
    peak_memory_bytes: int
    blueprint_hash: str
    preserves_function: bool
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return asdict(self)


def plan(
    source: str | Path | Checkpoint,
    recipe: Recipe,
    *,
    jobs: int = 2,
    shard_size: int = DEFAULT_SHARD,
) -> Plan:
    """The plan of `convert(source, ..., recipe)`, from headers alone."""
    opened = source if isinstance(source, Checkpoint) else peek(source)
    return plan_of(blueprint(opened, recipe), jobs=jobs, shard_size=shard_size)


def plan_of(built: Blueprint, *, jobs: int = 2, shard_size: int = DEFAULT_SHARD) -> Plan:
    """The plan of a blueprint."""
    moe, dense = built.recipe.moe, built.dense.config
    width = dense["intermediate_size"] // moe.granularity
    hidden, layers = dense["hidden_size"], len(built.sites)
    idle = layers * (moe.num_experts - moe.top_k) * 3 * hidden * width
    total = sum(e.lazy.size for e in built.entries.values())
    dense_total = sum(math.prod(shape) for shape in built.dense.family.shapes(dense).values())
    products = _in_products({n: e.shape for n, e in built.entries.items()}) + _tied_head(dense)
    return Plan(
        source=str(built.source.folder),
        family=built.dense.family.model_type,
        target=built.native.model_type,
        num_layers=dense["num_hidden_layers"],
        moe_layers=sorted(built.sites),
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        expert_width=width,
        shared_width=built.shared_width,
        dense_parameters=dense_total,
        total_parameters=total,
        active_parameters=total - idle,
        dense_flops_per_token=flops_per_token(built.dense),
        flops_per_token=2 * (products - idle),
        output_bytes=lay_out(built.entries, shard_size).nbytes,
        peak_memory_bytes=peak_memory(built, jobs),
        blueprint_hash=built.hash,
        preserves_function=built.preserves_function,
        warnings=advice.warnings(built),
    )


def flops_per_token(dense: Dense) -> int:
    """FLOPs of a forward pass of the dense model per token, counted as in `Plan`."""
    return 2 * (_in_products(dense.family.shapes(dense.config)) + _tied_head(dense.config))


def _tied_head(config: Config) -> int:
    """Weights of a head that is the embedding, and so not among the tensors."""
    return int(config["vocab_size"] * config["hidden_size"]) if config["tie_word_embeddings"] else 0


def _in_products(shapes: dict[str, tuple[int, ...]]) -> int:
    """Weights that a token meets in a matrix product: every matrix but the embedding."""
    return sum(
        math.prod(shape) for name, shape in shapes.items() if len(shape) > 1 and "embed_tokens" not in name
    )


def peak_memory(built: Blueprint, jobs: int) -> int:
    """Bytes of memory that writing the blueprint takes at most."""
    config = built.dense.config
    whole = built.recipe.init.working_memory(config["intermediate_size"], config["hidden_size"])
    computed = any(e.extents is None for e in built.entries.values())
    block = BLOCK_MEMORY + built.recipe.moe.granularity * (4 << 20) if computed else 0
    return BASE_MEMORY + jobs * (2 * CHUNK + block + whole)
