"""The memory of a GPU in training, laid out as `upcycle train` does: FSDP2 over all, experts shared out.

Weights, gradients and moments are counted. Gathered blocks and activations are estimated for bf16 arithmetic
and one row at a time. Layers are recomputed in the backward pass (`train.activation_checkpointing`) if the
model can do that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from upcycle.advice.situation import Situation
from upcycle.advice.statements import Statement
from upcycle.blueprints.blueprint import Blueprint
from upcycle.families import Stack
from upcycle.system import gpus
from upcycle.system.gpus import Gpu
from upcycle.system.wording import rounded_size

WEIGHT, GRADIENT, MOMENTS = 4, 4, 8  # bytes a parameter, float32 and AdamW
GATHERED = 2  # bytes a parameter of a gathered bf16 copy
REDUCED = 2 + 4  # bytes a parameter of a bf16 gradient on its way to float32 shards
LOGITS = 2 + 4 + 4 + 4  # bytes a logit: bf16, float32, its log-softmax, the gradient
USABLE = 0.9  # share of a GPU's memory; the CUDA context, buffers of collectives and fragments take the rest
MOST_EXPERT_PARALLEL = 8  # ranks of one machine, within which all-to-all is cheap
MOST_GPUS = 1 << 16
UNMEASURED = "the estimates were not compared with a GPU"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    moments: float
    gathered: float  # blocks that are whole for a moment, and their gradients
    activations: float

    @property
    def total(self) -> float:
        """The sum of all parts in bytes."""
        return self.weights + self.gradients + self.moments + self.gathered + self.activations


def expert_parallel(count: int, built: Blueprint) -> int:
    """Return how many of `count` GPUs share the experts of a layer.

    It is the largest number up to `MOST_EXPERT_PARALLEL` that divides both. Experts with a response norm look
    at all tokens of an image and are not shared out, so it is 1 for them.
    """
    if any(built.dense.feed_forward(site.layer, site.stack).response() for site in built.sites):
        return 1
    common = math.gcd(count, *built.expert_counts)
    return max(n for n in range(1, MOST_EXPERT_PARALLEL + 1) if common % n == 0)


def per_gpu(situation: Situation, count: int) -> Memory:
    """Return the memory that one of `count` GPUs needs."""
    total, ep = situation.plan.total_parameters, expert_parallel(count, situation.built)
    block = max(b.own + b.experts / ep for b in situation.blocks)
    rest = total - sum(b.own + b.experts for b in situation.blocks)
    if count > 1:  # one block is in use while the next arrives; embedding and head stay until the step ends
        gathered = (2 * GATHERED + REDUCED) * block + (GATHERED + REDUCED) * rest
    else:  # nothing is sharded; autocast keeps a copy of every weight
        gathered = float(GATHERED * total)
    return Memory(
        weights=WEIGHT * total / count,
        gradients=GRADIENT * total / count,
        moments=MOMENTS * total / count,
        gathered=gathered,
        activations=activations(situation),
    )


def recomputed(situation: Situation) -> bool:
    """Return whether blocks can be recomputed in the backward pass; those of ConvNeXt cannot."""
    return situation.kind != "convolutional network"


def activations(situation: Situation) -> float:
    """Return the bytes of activations for one row.

    They are the inputs of all blocks, the largest block, which is recomputed, and the logits. A model that
    cannot recompute keeps all blocks and the logits.
    """
    built, config = situation.built, situation.built.dense.config
    last = built.dense.stacks[-1]
    outputs = config["vocab_size"] if built.dense.has_language_head else 0
    logits = LOGITS * outputs * situation.lengths[last.name]
    blocks = [
        block_bytes(built, stack, layer) * situation.lengths[stack.name]
        for stack in built.dense.stacks
        for layer in range(stack.count)
    ]
    if not recomputed(situation):
        return logits + sum(blocks)
    entering = sum(
        2 * stack.count * stack.hidden * situation.lengths[stack.name] for stack in built.dense.stacks
    )
    return entering + logits + max(blocks)


def block_bytes(built: Blueprint, stack: Stack, layer: int) -> float:
    """Return the bytes that one block keeps of a token for its backward pass, in bf16 with flash attention.

    Beside its network a block keeps 16 H + 4 q + 2 kv + 4 heads. A dense network keeps 8 I + 8 if it is gated
    and 4 I + 8 if it is not. Experts keep K (4 H + 8 I + 40) + 4 E + 12. These are the tensors that torch
    saves in a block of transformers' Llama and of Mixtral, counted one by one. A block of ConvNeXt keeps 8 H
    beside its network. A block of ConvNeXt V2, which has a response norm, keeps 6 H beside it and 8 I in it.
    """
    config, network = built.dense.config, built.dense.feed_forward(layer, stack.name)
    neuron = 8 if network.gate is not None or network.response() else 4
    beside = float(_beside_network(built, stack, convnet_scales=not network.response()))
    site = next((s for s in built.sites if (s.stack, s.layer) == (stack.name, layer)), None)
    if site is None:
        return beside + neuron * stack.width + 8
    router = built.recipe.at(site.stack).router
    row = router.group or built.dense.family.lengths(config)[site.stack]
    for count, width in ((site.num_experts, site.width), (site.universal_experts, site.universal_width)):
        if count:
            chosen = router.experts_per_token(count, site.top_k, row)
            beside += chosen * (4 * site.hidden + neuron * width + 40) + 4 * count
    return beside + 12


def _beside_network(built: Blueprint, stack: Stack, *, convnet_scales: bool) -> int:
    """Return the bytes of a token for norms, sums, and attention or convolution: all but the network."""
    config = built.dense.config
    heads, width = config["num_attention_heads"], config["head_dim"]
    if not heads:
        return (8 if convnet_scales else 6) * stack.hidden
    keys = 2 * (config.get("num_key_value_heads") or heads) * width
    return 16 * stack.hidden + 4 * heads * width + 2 * keys + 4 * heads


def fits(situation: Situation, count: int, gpu: Gpu) -> bool:
    """Return whether the training fits on `count` GPUs."""
    return per_gpu(situation, count).total <= USABLE * gpu.memory


def least(situation: Situation, gpu: Gpu) -> int | None:
    """Return the smallest power of two of GPUs on which the training fits, or None if there is none."""
    count = 1
    while count <= MOST_GPUS:
        if fits(situation, count, gpu):
            return count
        count *= 2
    return None


def statements(situation: Situation) -> list[Statement]:
    """Return the memory that a GPU needs and whether it has it.

    If no number of GPUs was given, the result is the number that is needed.
    """
    gpu, count, topic = situation.gpu, situation.asked.gpus, "memory"
    again = "layers recomputed" if recomputed(situation) else "no layer recomputed"
    source = "counted; gathered blocks and activations estimated"
    needed = least(situation, gpu)
    enough = f"the least power of two is {needed} {gpu.name}" if needed else f"no number of {gpu.name} does"
    if count is None:
        said = f"training in mixed precision: {enough}"
        why = f"the layout of upcycle train, one row at a time ({situation.row_said}), {again}; {UNMEASURED}"
        return [
            Statement(topic=topic, said=said, value=needed, unit="GPUs", source=source, inside=None, why=why)
        ]
    found, ep = per_gpu(situation, count), expert_parallel(count, situation.built)
    parts = ", ".join(
        f"{name} {rounded_size(part)}"
        for name, part in (
            ("weights", found.weights), ("gradients", found.gradients), ("moments", found.moments),
            ("gathered blocks", found.gathered), ("activations", found.activations),
        )
    )  # fmt: skip
    why = (
        f"parallel.fsdp = {count}, ep = {ep}; one row at a time ({situation.row_said}), {again}; {UNMEASURED}"
    )
    out = [
        Statement(
            topic=topic, said=f"each GPU holds {rounded_size(found.total)}: {parts}", value=found.total,
            unit="bytes", source=source, inside=None, why=why,
        )
    ]  # fmt: skip
    room = f"{USABLE:.0%} of the {rounded_size(gpu.memory)} of {gpu.name}"
    if found.total <= USABLE * gpu.memory:
        said = f"it fits into {room}"
    else:
        larger = [g for g in gpus.KNOWN if g.memory > gpu.memory and fits(situation, count, g)]
        said = f"it does not fit into {room}: {enough}"
        said += f"; {count} {larger[0].name} would" if larger else ""
        said += "; or shorter rows" if needed is None and not larger else ""
    out.append(
        Statement(
            topic=topic, said=said, value=needed, unit="GPUs at least", source="data sheet of the maker",
            inside=None, why=why,
        )
    )  # fmt: skip
    return out
