"""The arithmetic of a step of which not everything is trained, in forward passes.

A matrix product costs as much again for the gradient of its weight, and once more for that of its input. The
first is for what is trained, and the second for everything after the first block with something trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from upcycle.blueprints import cost
from upcycle.records.run import StageCost
from upcycle.training.anatomy import Anatomy, Members
from upcycle.training.course import Course, Leg
from upcycle.training.start import Start

WHOLE = 3.0  # forward passes of a step that trains everything


def flops_per_row(
    start: Start,
    anatomy: Anatomy | None,
    leg: Leg,
    lengths: Mapping[str, int],
    *,
    all_scores: bool = False,
) -> int:
    """Return the FLOPs of training on a row in a stage. `anatomy` is None if no stage freezes anything.

    `all_scores` counts both halves of causal attention, as published MFU does.
    """
    train, whole = leg.run.train, WHOLE
    if anatomy is not None and not (train.only is None and train.freeze is None):
        chosen = anatomy.chosen(train.only, train.freeze)
        whole = passes(anatomy, chosen, lengths, start, all_scores=all_scores)
    return start.training_flops_per_row(lengths, whole, all_scores=all_scores)


def stage_costs(
    start: Start, anatomy: Anatomy | None, course: Course, lengths: Mapping[str, int]
) -> tuple[StageCost, ...]:
    """Return the FLOPs of training on a row in each stage of a run; a run without stages has a single one."""
    return tuple(
        StageCost(first=leg.first, training_flops_per_row=flops_per_row(start, anatomy, leg, lengths))
        for leg in course.legs
    )


def mean(costs: Sequence[StageCost], course: Course) -> int:
    """Return the mean of the FLOPs per row over all steps of a run."""
    total = sum(leg.steps * each.training_flops_per_row for leg, each in zip(course.legs, costs, strict=True))
    return total // sum(leg.steps for leg in course.legs)


def passes(
    anatomy: Anatomy,
    chosen: Members,
    lengths: Mapping[str, int],
    start: Start,
    *,
    all_scores: bool = False,
) -> float:
    """Return the forward passes that a step costs which trains `chosen`; `WHOLE` if that is everything.

    Matrices count by their weights times the tokens of a row that meet them, and attention scores with what
    lies behind the first trained block. In that block itself all inputs count, or none if a single parameter
    of it is trained: a router, or the head.
    """
    depths, met = _depths(anatomy), _met(anatomy, lengths, start)
    whole = sum(met.values())
    forward = cost.flops_per_row(start.dense, start.built, lengths, all_scores=all_scores)
    matrices = min(1.0, 2 * whole / forward)  # the rest is attention scores
    first = min(depths[name] for name in chosen)
    first += sum(depths[name] == first for name in chosen) == 1 and first > 0
    head = _head(anatomy)
    ends = {name for name, p in anatomy.read() if id(p) in head}
    used = {name: max(depths.values()) if name in ends else depth for name, depth in depths.items()}
    behind = sum(size for name, size in met.items() if used[name] >= first) / whole
    weights = sum(size for name, size in met.items() if name in chosen) / whole
    # Both factors of a score have gradients, so scores cost two passes where gradients go through.
    return 1 + matrices * (behind + weights) + (1 - matrices) * 2 * behind


def _depths(anatomy: Anatomy) -> dict[str, int]:
    """Return how deep every parameter lies: 0 before the blocks, 1 and more in them, most after them."""
    counts: dict[str, int] = {}
    for stack, _, _ in anatomy.blocks:
        counts[stack.blocks] = counts.get(stack.blocks, 0) + 1
    last, body = sum(counts.values()) + 1, anatomy.body
    return {
        name: last if body.follows(name) else anatomy.family.depth(name.removeprefix(body.prefix), counts)
        for name, _ in anatomy.read()
    }


def _met(anatomy: Anatomy, lengths: Mapping[str, int], start: Start) -> dict[str, float]:
    """Return the weights of each matrix times the tokens of a row that meet it."""
    blocks = [(prefix, stack.name) for stack, _, prefix in anatomy.blocks]
    used = {}
    for site in start.built.sites if start.built else ():
        assert start.built is not None
        router, count = start.built.parts[site.stack].router, site.num_experts
        chosen = router.experts_per_token(count, site.top_k, router.group or lengths[site.stack])
        used[site.stack] = chosen / count if count else 1.0
    modules = anatomy.model.modules()
    tables = {id(p) for m in modules if isinstance(m, nn.Embedding) for p in m.parameters()} - _head(anatomy)
    out: dict[str, float] = {}
    for name, parameter in anatomy.read():
        if parameter.ndim < 2:
            continue
        stack = next((own for prefix, own in blocks if name.startswith(prefix)), start.dense.stacks[-1].name)
        share = used.get(stack, 1.0) if any(name.startswith(s.prefix) for s in anatomy.stacked) else 1.0
        out[name] = 0.0 if id(parameter) in tables else share * math.prod(parameter.shape) * lengths[stack]
    return out


def _head(anatomy: Anatomy) -> set[int]:
    """Return the identities of the parameters of the head, which may be a table as well."""
    head = anatomy.model.get_output_embeddings()
    return set() if head is None else {id(p) for p in head.parameters()}
