"""The time of a step: arithmetic at a stated share of the peak, and collectives at the speed of their links.

A collective of n ranks takes as long as NCCL's model of a ring says: each rank sends and gets (n - 1) / n of
the bytes, twice for an all-reduce, and each step of the ring has a latency (`src/graph/tuning.cc`). Ranks of
one machine share its ports, so a ring through m ranks of each machine has m ports. An all-to-all sends to
ranks of the machine over NVLink and to others through the rank's own port.
"""

from __future__ import annotations

from dataclasses import dataclass

from upcycle.blueprints.cost import flops_per_row
from upcycle.forecast.setting import Setting
from upcycle.forecast.traffic import Collective, collectives
from upcycle.system.gpus import MACHINE, Gpu

ARITHMETIC = 0.524
"""Share of the peak that arithmetic reaches: MFU of dense continued training of Llama 3 8B on 128 H100 with
Megatron ("Llama 3 Meets MoE", Table 4). It has the cost of that run's communication in it."""
LINK = 0.8
"""Share of a link's speed that collectives reach. It is an assumption."""
CALL, STEP, STEP_BETWEEN = 8.4e-6, 3.4e-6, 14e-6
"""Seconds of latency: a call, a step of a ring within a machine, one between machines (NCCL's ring, protocol
Simple)."""


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of a step on one rank."""

    arithmetic: float
    parameters: float  # gathers and reductions of parameters and gradients, which arithmetic can hide
    activations: float  # collectives between two operations, which nothing hides: experts, tensor parallelism

    @property
    def overlapped(self) -> float:
        """The seconds if the traffic of parameters hides behind arithmetic, or arithmetic behind it."""
        return max(self.arithmetic, self.parameters) + self.activations

    @property
    def in_turn(self) -> float:
        """The seconds if nothing overlaps."""
        return self.arithmetic + self.parameters + self.activations


def of(setting: Setting, gpu: Gpu) -> Time:
    """Return the time of a step on a kind of GPU."""
    found = collectives(setting)
    return Time(
        arithmetic=arithmetic(setting, gpu),
        parameters=sum(each.times * seconds(each, gpu) for each in found if not each.waited_for),
        activations=sum(each.times * seconds(each, gpu) for each in found if each.waited_for),
    )


def flops(setting: Setting, *, recomputed: bool = True) -> float:
    """Return the FLOPs of a step on one rank: three forward passes, and one more to recompute blocks.

    They are fewer if a part is not trained. A teacher adds a forward pass of its own.

    All attention scores count, as in the measurement that `ARITHMETIC` comes from.
    """
    row = flops_per_row(setting.built.dense, setting.built, setting.lengths, all_scores=True)
    passes = setting.effort + (1 if recomputed and setting.recompute is True else 0)
    taught = 0
    if setting.teacher is not None:
        taught = flops_per_row(setting.teacher, None, setting.lengths, all_scores=True)
    return (passes * row + taught) * setting.rows * setting.passes / setting.layout.tp


def arithmetic(setting: Setting, gpu: Gpu) -> float:
    """Return the seconds of arithmetic."""
    return flops(setting) / (gpu.peak_flops * ARITHMETIC)


def seconds(collective: Collective, gpu: Gpu) -> float:
    """Return the seconds of one call."""
    n, beside = collective.ranks, min(collective.ranks, max(1, MACHINE // collective.apart))
    machines = -(-n // beside)
    if collective.kind == "all_to_all":
        inside, outside = (beside - 1) / n * collective.bytes, (n - beside) / n * collective.bytes
        return CALL + max(inside / (LINK * gpu.nvlink), outside / (LINK * gpu.network))
    twice = 2 if collective.kind == "all_reduce" else 1
    speed = gpu.nvlink if machines == 1 else min(gpu.nvlink, beside * gpu.network)
    latency = (n - machines) * STEP + (machines - 1) * STEP_BETWEEN
    return CALL + twice * (latency + (n - 1) / n * collective.bytes / (LINK * speed))
