"""The plan: what a blueprint costs in parameters, FLOPs, bytes and memory, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from upcycle.blueprints import caveats
from upcycle.blueprints.blueprint import Blueprint
from upcycle.blueprints.making import blueprint
from upcycle.blueprints.shards import DEFAULT_SHARD, lay_out
from upcycle.checkpoints.carried import has_tokenizer
from upcycle.checkpoints.checkpoint import CHUNK, Checkpoint
from upcycle.checkpoints.hub import peek
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError, shown
from upcycle.families import Config, Family, Stack
from upcycle.families._weights import Weight, products
from upcycle.recipe import RecipeLike

BASE_MEMORY = 90_000_000  # bytes used by an interpreter with numpy and the other imports of a conversion
READER_MEMORY = 320_000_000  # bytes of transformers, which opens the tokenizers of source and result
BLOCK_MEMORY = 32 << 20  # most bytes that computing one block of a tensor takes, besides whole tensors


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The costs of what will be built.

    FLOPs are those of a forward pass per token in matrix products, 2 per weight. Attention scores, which grow
    with the context, and norms are not counted; the embedding is a look-up. In a model of stages, a token is
    one of the first stage (a patch of the image), and it has its share of the tokens of the other stages.

    With a successor, the dense model is the one of its size, and `predecessor` has the counts of the source:
    `parameters`, `active_parameters` and `flops_per_token`.
    """

    source: str
    family: str
    target: str
    kind: str  # what is made, used as a column heading: MoE, deeper or narrower
    source_kind: str  # likewise what it is made of: dense, or MoE
    num_layers: int
    moe_layers: list[int] | dict[str, list[int]]
    num_experts: int
    top_k: int
    routing: str
    expert_width: int
    universal_experts: int
    universal_width: int
    # the same for each stack with MoE layers; the fields above are those of the first
    by_stack: dict[str, dict[str, int]]
    shared_width: int
    dense_parameters: int
    dense_active_parameters: int  # per token; fewer if the source has experts
    total_parameters: int
    active_parameters: int
    dense_flops_per_token: int
    flops_per_token: int
    predecessor: dict[str, int] | None
    output_bytes: int
    peak_memory_bytes: int
    blueprint_hash: str
    preserves_function: bool
    routers: list[dict[str, Any]]  # how the rows of each router that starts from data lie to one another
    warnings: list[str]

    @property
    def made(self) -> str:
        """The text that says what is made of the dense model, a sentence without its full stop."""
        if not self.num_moe_layers:
            return f"a dense model of {self.num_layers} layers, no experts"
        shared = f", shared expert of {self.shared_width}" if self.shared_width else ""
        where: dict[str, list[str]] = {}
        for stack, found in self.by_stack.items():
            others = f" and {found['universal_experts']} universal ones of {found['universal_width']}"
            said = f"{found['num_experts']} experts of {found['expert_width']} neurons"
            where.setdefault(said + (others if found["universal_experts"] else ""), []).append(stack)
        experts = [f"{said} in {' and '.join(stacks)}" for said, stacks in where.items()]
        return (
            f"{', '.join(experts) if len(where) > 1 else next(iter(where))}, {self.routing}, in "
            f"{self.num_moe_layers} of {self.num_layers} layers{shared}"
        )

    @property
    def columns(self) -> list[tuple[str, int, int, int]]:
        """What each model is called, its parameters, those active per token, and its FLOPs per token."""
        dense = (self.dense_parameters, self.dense_active_parameters, self.dense_flops_per_token)
        made = (self.kind, self.total_parameters, self.active_parameters, self.flops_per_token)
        if (source := self.predecessor) is None:
            return [(self.source_kind, *dense), made]
        whole = (source["parameters"], source["active_parameters"], source["flops_per_token"])
        return [(self.source_kind, *whole), (f"{self.source_kind}, narrower", *dense), made]

    @property
    def num_moe_layers(self) -> int:
        """The number of blocks that become MoE layers, in all stacks together."""
        layers = self.moe_layers
        return len(layers) if isinstance(layers, list) else sum(map(len, layers.values()))

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON has it."""
        return asdict(self)


def plan(
    source: str | Path | Checkpoint,
    recipe: RecipeLike = None,
    *,
    jobs: int = 2,
    shard_size: int = DEFAULT_SHARD,
) -> Plan:
    """Return the plan of `convert(source, ..., recipe)`, worked out from headers alone."""
    return plan_of(blueprint(source, recipe, opener=peek), jobs=jobs, shard_size=shard_size)


def plan_of(built: Blueprint, *, jobs: int = 2, shard_size: int = DEFAULT_SHARD) -> Plan:
    """Return the plan of a blueprint. Raises `UpcycleError` if nothing could write it."""
    refuse_no_jobs(jobs)
    dense = built.dense if built.sites else built.dense.whole
    idle, counts = idle_weights(built), _counts(dense)
    total = sum(e.lazy.size for e in built.entries.values())
    met = _per_token(built.dense, built.weights) + built.tied_head - idle.in_products
    return Plan(
        source=built.source.given,
        family=built.dense.family.model_type,
        target=built.target.model_type,
        kind=built.target.kind,
        source_kind=dense.called,
        num_layers=built.family_config["num_hidden_layers"]
        + (built.tower.family_config["num_hidden_layers"] if built.tower else 0),
        moe_layers=built.moe_layers,
        num_experts=built.sites[0].num_experts if built.sites else 0,
        top_k=built.sites[0].top_k if built.sites else 0,
        routing=_routing(built),
        expert_width=built.sites[0].width if built.sites else 0,
        universal_experts=built.sites[0].universal_experts if built.sites else 0,
        universal_width=built.sites[0].universal_width if built.sites else 0,
        by_stack={
            site.stack: {
                "num_experts": site.num_experts,
                "expert_width": site.width,
                "universal_experts": site.universal_experts,
                "universal_width": site.universal_width,
            }
            for site in built.all_sites
        },
        shared_width=built.shared_width,
        dense_parameters=counts["parameters"],
        dense_active_parameters=counts["active_parameters"],
        total_parameters=total,
        active_parameters=total
        - sum(e.lazy.size for n, e in built.entries.items() if built.predicts_further(n))
        - idle.parameters
        - (idle_weights(built.tower).parameters if built.tower else 0),
        dense_flops_per_token=counts["flops_per_token"],
        flops_per_token=2 * (met + mixing(built)),
        predecessor=None if dense is dense.whole else _counts(dense.whole),
        output_bytes=lay_out(built.entries, shard_size).nbytes,
        peak_memory_bytes=peak_memory(built, jobs),
        blueprint_hash=built.hash,
        preserves_function=built.preserves_function,
        routers=[
            {"stack": site.stack, "layer": site.layer, **rows.as_dict()}
            for site, rows in built.router_rows.items()
        ],
        warnings=caveats.warnings(built),
    )


def _counts(dense: Dense) -> dict[str, int]:
    """Return what a dense model costs, and what is around it, by the keys of `Plan.predecessor`."""
    stored = sum(tensor.size for tensor in (*dense.tensors.values(), *dense.around.values()))
    return {
        "parameters": stored,
        "active_parameters": stored - dense.idle,
        "flops_per_token": flops_per_token(dense),
    }


def _routing(built: Blueprint) -> str:
    """Return how tokens are routed to experts, in a few words for each stack that differs."""
    said = []
    recipes = [*built.parts.values(), *(built.tower.parts.values() if built.tower else ())]
    for part in recipes:
        factor = getattr(part.router, "capacity_factor", None)
        way = f"top-{part.moe.top_k}" if part.router.name == "top_k" else part.router.name.replace("_", " ")
        said.append(way if factor is None else f"{way} with capacity factor {factor:g}")
    if not said:
        return "no routing"
    return said[0] if len(set(said)) == 1 else " and ".join(said)


@dataclass(frozen=True, kw_only=True)
class Idle:
    """The expert weights that a token does not use, on average.

    `parameters` counts all of them, and `in_products` those in matrix products, where a stage of fewer tokens
    counts in proportion.
    """

    parameters: int
    in_products: int


def idle_weights(built: Blueprint, stack: str | None = None, length: int | None = None) -> Idle:
    """Return the expert weights that a token does not use, in all layers together.

    With `stack`, only the layers of that stack count. `length` is the number of tokens in a row.
    """
    lengths, parts = built.dense.lengths, _parts(built.dense)
    parameters, in_products = 0.0, 0.0
    for site in built.sites:
        if stack not in (None, site.stack):
            continue
        row = length or lengths[site.stack]
        part = 1.0 if stack else parts[site.stack]
        router = built.parts[site.stack].router
        network = built.dense.feed_forward(site.layer, site.stack)
        for count, width in ((site.num_experts, site.width), (site.universal_experts, site.universal_width)):
            if not count:
                continue
            unused = count - router.experts_per_token(count, site.top_k, router.group or row)
            matrices = len(network.matrices()) * network.hidden * width
            biases = dict.fromkeys(network.biases() | network.response(), width)
            if "down_bias" in biases:
                biases["down_bias"] = network.hidden
            in_products += part * unused * matrices
            if not router.has_slots:  # otherwise every token contributes to every slot
                parameters += unused * (matrices + sum(biases.values()))
    return Idle(parameters=round(parameters), in_products=round(in_products))


def mixing(built: Blueprint, stack: str | None = None) -> int:
    """Return the work of mixing tokens and slots per token, counted in weights.

    A router with slots computes every slot from the tokens and every token from the slots, which is 2 E S H a
    layer. The sum is over all layers, or over those of one stack.
    """
    parts = _parts(built.dense)
    total = 0.0
    for site in built.sites:
        router = built.parts[site.stack].router
        if router.has_slots and stack in (None, site.stack):
            rows = router.rows(site.num_experts + site.universal_experts)
            total += (1.0 if stack else parts[site.stack]) * 2 * rows * site.hidden
    return round(total)


def flops_per_token(dense: Dense) -> int:
    """Return the FLOPs of a forward pass of the dense model per token, counted as in `Plan`."""
    return 2 * (_per_token(dense, dense.weights) + dense.tied_head - dense.idle)


def _per_token(dense: Dense, weights: Mapping[str, Weight]) -> int:
    """Return the number of weights that a token meets in matrix products, in all stacks."""
    return round(sum(part * _of_stack(dense, weights, name) for name, part in _parts(dense).items()))


def _of_stack(dense: Dense, weights: Mapping[str, Weight], stack: str) -> int:
    """Return the number of weights that a token of one stack meets in matrix products."""
    return products({name: w for name, w in weights.items() if dense.family.stack_of(name) == stack})


def _parts(dense: Dense) -> dict[str, float]:
    """Return the number of tokens of a row in each stack, divided by that at the start of the model."""
    begins = dense.family.length(dense.config)
    return {name: length / begins for name, length in dense.lengths.items()}


def flops_per_row(
    dense: Dense, built: Blueprint | None, lengths: Mapping[str, int], *, all_scores: bool = False
) -> int:
    """Return the FLOPs of a forward pass of one row: matrix products and attention scores.

    `lengths` has the number of tokens of the row in each stack. `built` is None for the dense model itself.
    Causal attention needs half of the scores, on average; `all_scores` counts both halves, as papers do that
    report FLOPs or MFU. A sliding window has the scores within it, and a block without attention has none.
    """
    config = built.family_config if built else dense.config
    stacks = dense.family.stacks(config) if built else dense.stacks
    weights = built.weights if built else dense.weights
    total, last = 0, stacks[-1].name
    tied_head = built.tied_head if built else dense.tied_head
    for stack in stacks:
        length = lengths[stack.name]
        met = _of_stack(dense, weights, stack.name) + (tied_head if stack.name == last else 0)
        if built is None:
            met -= dense.idle
        if built:
            met += mixing(built, stack.name) - idle_weights(built, stack.name, length).in_products
        scores = sum(_scores(dense.family, config, stack, i, length) for i in range(stack.count))
        total += 2 * met * length + (scores // 2 if stack.causal and not all_scores else scores)
        if stack.across:
            total += stack.count * 4 * stack.attention * length * lengths[stack.across]
    return total


def _scores(family: Family, config: Config, stack: Stack, layer: int, length: int) -> int:
    """Return the FLOPs of the scores of a block on a row; both halves if attention is causal."""
    reach = family.reach(config, layer, length)
    # The first tokens of a row have fewer before them.
    pairs = 2 * reach * length - reach**2 if stack.causal else reach * length
    # A pair of tokens has a product for its score and one for its value; a token and a position have one.
    return family.scored(config, stack, layer) * (4 * pairs + 2 * family.relative(config) * length)


def refuse_no_jobs(jobs: int) -> None:
    """Raise `UpcycleError` for a number of threads that writes nothing."""
    if type(jobs) is not int or jobs < 1:
        raise UpcycleError(f"jobs = {shown(jobs)}; it must be a whole number of 1 or more")


def peak_memory(built: Blueprint, jobs: int) -> int:
    """Return the most bytes of memory that writing the blueprint takes."""
    config = built.dense.whole.config  # experts are chosen from its networks
    whole = built.recipe.init.working_memory(config["intermediate_size"], config["hidden_size"])
    computed = any(e.extents is None for e in built.entries.values())
    block = BLOCK_MEMORY + built.recipe.moe.granularity * (4 << 20) if computed else 0
    opens = built.reads_otherwise and has_tokenizer(built.source.folder) and find_spec("transformers")
    return BASE_MEMORY + (READER_MEMORY if opens else 0) + jobs * (2 * CHUNK + block + whole)
