"""Chooses the number of rows per forward pass if the run file does not: as many as fit in memory.

A batch that fits is one part. Otherwise it is cut into equal parts, whose gradients add up to the same, apart
from the routers' losses if the shares of experts are buffered: the balance loss, and the others if rows have
padding. The number is stored in checkpoints, so that a resumed run uses the same one. A run that had whole
batches and goes on with fewer ranks is cut as well if its rows do not fit today.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace

import torch

from upcycle.records.state import RunState
from upcycle.sharding.layout import Layout
from upcycle.system import memory, progress
from upcycle.training import parts
from upcycle.training.course import Course
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run
from upcycle.training.start import Start

_SHARE = 0.7  # usable share of the free memory; the rest is for what is not counted
_WIDTH = 4  # bytes of a weight, its gradient, and each of its moments
_LOGITS = 16  # bytes per logit: itself, its float32 copy, its log-softmax, the gradient
_TAUGHT = 12  # bytes per logit of a teacher: itself, its log-softmax, and the divergence of that word
_KEPT = {"float32": 8, "mixed": 6, "bfloat16": 5}
"""Bytes per number that goes into or comes out of a matrix: what the backward pass keeps, and more."""


def chosen(
    run: Run,
    begun: Start,
    lengths: Mapping[str, int],
    here: Ranks,
    state: RunState | None,
    *,
    precision: str = "float32",
) -> Run:
    """Return `run` with the number of rows of a forward pass; unchanged if all rows fit.

    This is the number that the run asks for, the one it had when it stopped, or as many as fit. If nobody
    knows how many fit, a run that goes on with fewer ranks has as many as a rank had before.
    """
    if run.train.micro_batch is not None:
        return run
    if state is not None and state.micro_batch is not None:
        return _with(run, state.micro_batch)
    share = run.train.rows // here.dp_size
    before = None if state is None else _share_of(run, state)
    if state is not None and (before is None or share <= before):
        return run
    most = here.share(_rows_that_fit(run, begun, lengths, here, precision))
    most = before if most is None else most
    if most is None or share <= most:
        return run
    if not parts.may_be_cut(run, begun.built):
        if before is not None and here.first:
            progress.warn(
                f"each process has {share} rows in one pass instead of {before}, because balance losses of "
                f"parts do not add up if they are pooled; if memory runs out, take more processes, or set "
                f"train.micro_batch"
            )
        return run
    sizes = parts.sizes(run, begun.built, lengths, share)
    return _with(run, max((n for n in sizes if n <= most), default=sizes[0]))


def _share_of(run: Run, state: RunState) -> int | None:
    """Return a rank's rows of a step when `state` was saved; None if its file is too old to say."""
    return None if state.layout is None else run.train.rows // Layout(**state.layout).dp


def _with(run: Run, rows: int) -> Run:
    return replace(run, train=replace(run.train, micro_batch=rows))


def _rows_that_fit(
    run: Run, begun: Start, lengths: Mapping[str, int], here: Ranks, precision: str
) -> int | None:
    """Return the rows of a forward and backward pass that fit; None if free memory is unknown."""
    free = _free(here)
    if free is None:
        return None
    copied = here.device.type == "cpu" and run.checkpoint.asynchronous
    moments = run.optimizer.copies
    # A weight, its gradient and its moments, and without the gradient what is written beside the steps.
    numbers = (2 + moments + (1 + moments) * copied) * begun.parameters
    free -= int(_WIDTH * numbers) // here.layout.replica
    if begun.teacher is not None and run.teacher is not None and run.teacher.top_logits is None:
        width = 4 if precision == "float32" else 2
        free -= width * sum(tensor.size for tensor in begun.teacher.stored.values()) // here.layout.replica
    return max(1, int(_SHARE * free) // bytes_of_row(run, begun, lengths, precision))


def _free(here: Ranks) -> int | None:
    if here.device.type == "cuda":
        return int(torch.cuda.mem_get_info(here.device)[0])
    free = memory.available() if here.device.type == "cpu" else None
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    return free // max(1, int(beside) if beside.isdecimal() else here.world) if free else None


def bytes_of_row(run: Run, begun: Start, lengths: Mapping[str, int], precision: str) -> int:
    """Estimate the bytes that a row takes until its backward pass.

    These are the inputs and outputs of every matrix that its tokens pass, and the logits. With activation
    checkpointing they are those of one block of each stack, and the inputs of all blocks; if it is selective,
    also the outputs, about half of the whole, of the others. A teacher adds its logits. If masks keep
    documents apart, a byte is added for each pair of tokens, and a number for each block that keeps its copy.
    """
    family = begun.dense.family
    total, recomputed = 0, run.train.activation_checkpointing
    for stack in begun.dense.stacks:
        inner = sum(
            _numbers(name, entry.shape, begun)
            for name, entry in begun.entries.items()
            if len(entry.shape) > 1 and family.stack_of(name) == stack.name and "embed" not in name
            if name not in begun.dense.around
        )
        if recomputed and stack.count:
            others = inner // 2 if recomputed == "selective" else 0
            inner = inner // stack.count + stack.hidden * stack.count + others
        total += _KEPT[precision] * inner * lengths[stack.name]
    outputs = int(begun.dense.config.get("vocab_size") or 0) if begun.dense.has_language_head else 0
    if Course(run).isolates and not (run.train.attn_implementation or "").startswith("flash"):
        width = 4 if precision == "float32" else 2
        for stack in begun.dense.stacks:
            copies = 1 if recomputed is True else stack.count
            total += (1 + width * copies) * lengths[stack.name] ** 2
    logit = _LOGITS + (0 if run.teacher is None else _TAUGHT)
    return total + logit * outputs * lengths[begun.dense.stacks[-1].name]


def _numbers(name: str, shape: tuple[int, ...], begun: Start) -> int:
    """Count a token's numbers at the input and output of a matrix; for experts, times the experts used."""
    if begun.dense.config.get("vocab_size") in shape:
        return 0
    ends = shape[-1] + shape[-2] if len(shape) < 4 else shape[0] + math.prod(shape[1:])
    if ".experts." not in name or begun.built is None or not begun.built.sites:
        return ends
    site = begun.built.sites[0]
    count = shape[0] if len(shape) == 3 else 1
    met = begun.built.recipe.at(site.stack).router.experts_per_token(site.num_experts, site.top_k, 1 << 10)
    return math.ceil(ends * count * met / max(1, site.num_experts))
