"""The memory of a GPU in training, laid out as `upcycle train` does: FSDP2 over all, experts shared out.

It is that of the forecast (`forecast/memory.py`), for bf16 arithmetic on float32 weights and one row at a
time. Layers are recomputed in the backward pass (`train.activation_checkpointing`) if the model can do that.
"""

from __future__ import annotations

import math

from upcycle.advice.situation import Situation
from upcycle.advice.statements import Statement
from upcycle.blueprints.blueprint import Blueprint
from upcycle.forecast import memory
from upcycle.forecast.memory import Memory
from upcycle.forecast.outlook import USABLE
from upcycle.forecast.setting import Setting
from upcycle.sharding.layout import Layout
from upcycle.system import gpus
from upcycle.system.gpus import MACHINE, Gpu
from upcycle.system.wording import rounded_size

MOST_EXPERT_PARALLEL = MACHINE  # ranks of one machine, within which all-to-all is cheap
MOST_GPUS = 1 << 16
UNMEASURED = "the forecast was compared with torch's counts in fake worlds, not with a GPU"


def expert_parallel(count: int, built: Blueprint) -> int:
    """Return how many of `count` GPUs share the experts of a layer.

    It is the largest number up to `MOST_EXPERT_PARALLEL` that divides both. Experts with a response norm look
    at all tokens of an image and are not shared out, so it is 1 for them.
    """
    if any(built.dense.feed_forward(site.layer, site.stack).response() for site in built.sites):
        return 1
    common = math.gcd(count, *built.expert_counts)
    return max(n for n in range(1, MOST_EXPERT_PARALLEL + 1) if common % n == 0)


def setting(situation: Situation, count: int) -> Setting:
    """Return the step of one row a GPU on `count` GPUs."""
    return Setting(
        built=situation.built,
        layout=Layout(fsdp=count, ep=expert_parallel(count, situation.built)),
        lengths=situation.lengths,
        recompute=recomputed(situation),
    )


def per_gpu(situation: Situation, count: int) -> Memory:
    """Return the memory that one of `count` GPUs needs at the moment of a step that needs most."""
    return memory.peak(setting(situation, count))


def recomputed(situation: Situation) -> bool:
    """Return whether blocks can be recomputed in the backward pass; those of ConvNeXt cannot."""
    return situation.kind != "convolutional network"


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
    source = "counted, as in `upcycle plan --world`"
    needed = least(situation, gpu)
    enough = (
        f"the smallest power of two that fits is {needed} {gpu.name}"
        if needed
        else f"no number of {gpu.name} is enough"
    )
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
            ("weights", found.weights), ("gradients", found.gradients + found.reduced),
            ("moments", found.moments), ("gathered blocks", found.gathered),
            ("activations", found.activations), ("logits", found.logits),
        )
    )  # fmt: skip
    why = (
        f"parallel.fsdp = {count}, ep = {ep}; one row at a time ({situation.row_said}), {again}; {UNMEASURED}"
    )
    out = [
        Statement(
            topic=topic, said=f"each GPU needs {rounded_size(found.total)} at {found.moment}: {parts}",
            value=found.total, unit="bytes", source=source, inside=None, why=why,
        )
    ]  # fmt: skip
    room = f"{USABLE:.0%} of the {rounded_size(gpu.memory)} of {gpu.name}"
    if found.total <= USABLE * gpu.memory:
        said = f"it fits into {room}"
    else:
        larger = [g for g in gpus.KNOWN if g.memory > gpu.memory and fits(situation, count, g)]
        said = f"it does not fit into {room}: {enough}"
        said += f"; {count} {larger[0].name} would" if larger else ""
        said += "; shorter rows may fit" if needed is None and not larger else ""
    out.append(
        Statement(
            topic=topic, said=said, value=needed, unit="GPUs at least", source="data sheet of the maker",
            inside=None, why=why,
        )
    )  # fmt: skip
    return out
