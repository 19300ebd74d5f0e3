"""The cost of using the MoE: parameters, memory for keys and values, speed."""

from __future__ import annotations

from collections.abc import Mapping

from upcycle.advice.experts import GROWN
from upcycle.advice.situation import Situation
from upcycle.advice.statements import Statement
from upcycle.checkpoints.dtypes import BY_TORCH_NAME, FLOATS
from upcycle.dense.source import Dense
from upcycle.system.wording import rounded, rounded_size

SLOWDOWN = 0.4
SLOWDOWN_SOURCE = "Doubov et al. (arXiv 2411.08968)"


def cache_bytes(dense: Dense, lengths: Mapping[str, int], itemsize: int) -> int:
    """Return the bytes of keys and values that a decoder keeps for one row.

    `lengths` has the number of tokens of the row in each stack. `itemsize` is the number of bytes of an
    element. Layers with a sliding window keep the tokens of the window, and linear attention keeps none. A
    decoder that attends to an encoder keeps keys and values of the encoder's tokens too. Upcycling changes
    none of this.
    """
    config, family = dense.config, dense.family
    decoder = next((stack for stack in dense.stacks if stack.causal), None)
    if decoder is None:
        return 0
    length = lengths[decoder.name]
    if decoder.across:
        tokens = length + lengths[decoder.across]
        return itemsize * tokens * sum(family.cached(config, layer) for layer in range(decoder.count))
    blocks = range(decoder.count)
    return itemsize * sum(family.reach(config, i, length) * family.cached(config, i) for i in blocks)


def statements(situation: Situation) -> list[Statement]:
    """Return the parameters, cache and speed of the MoE beside those of the model before."""
    plan, built = situation.plan, situation.built
    itemsize = FLOATS[BY_TORCH_NAME[built.config["dtype"]]].itemsize
    total, active, dense = plan.total_parameters, plan.active_parameters, plan.dense_parameters
    counted, exact = "counted", "counted on the blueprint"
    out = [
        Statement(
            topic="inference",
            said=f"{rounded(total)} parameters ({rounded_size(total * itemsize)} in "
            f"{built.config['dtype']}), {rounded(active)} active for a token; {situation.before} has "
            f"{rounded(dense)}",
            value=active / dense, unit=f"times {situation.before}", source=counted, inside=True, why=exact,
        )
    ]  # fmt: skip
    length = situation.lengths[built.dense.stacks[-1].name]
    if cache := cache_bytes(built.dense, situation.lengths, itemsize):
        out.append(
            Statement(
                topic="inference",
                said=f"keys and values take {rounded_size(cache)} for {length:,} tokens, as in "
                f"{situation.before}",
                value=cache / length, unit="bytes a token", source=counted, inside=True, why=exact,
            )
        )  # fmt: skip
    dense_flops = "FLOPs of the source" if situation.grows else "dense FLOPs"
    if plan.predecessor is not None:
        dense_flops = "FLOPs of the narrower dense model"
    flops = plan.flops_per_token / plan.dense_flops_per_token
    out.append(
        Statement(
            topic="inference",
            said=f"a token takes {flops:.2f} times the {dense_flops}; a batch that meets all experts reads "
            f"{total / dense:.2f} times the weights",
            value=flops, unit=f"times the {dense_flops}", source="counted: bounds, not a measurement",
            inside=True, why="the first where arithmetic is the limit, the second where reading weights is",
        )
    )  # fmt: skip
    inside, why = None, "what was read of the source does not say on which sizes it was measured"
    if situation.kind != "decoder":
        inside, why = False, f"measured on language models that generate, this is {situation.kind}"
    elif situation.grows:
        inside, why = False, GROWN
    out.append(
        Statement(
            topic="inference", said="about 40 % slower at high demand, for larger models", value=SLOWDOWN,
            unit="slower", source=SLOWDOWN_SOURCE, inside=inside, why=why,
        )
    )  # fmt: skip
    return out
