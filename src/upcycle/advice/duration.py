"""The duration of training: FLOPs over peak FLOP/s times a published utilisation (MFU)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from upcycle.advice.situation import Situation
from upcycle.advice.statements import Statement
from upcycle.blueprints.blueprint import Blueprint
from upcycle.blueprints.cost import flops_per_row
from upcycle.system.wording import rounded


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """A share of peak FLOP/s that was reached on H100. The FLOPs of a step count all attention scores."""

    mfu: float
    what: str
    source: str
    size: float  # parameters of the dense model from which the MoE was made
    gpus: int
    granularity: float  # the dense width over the width of an expert

    def far(self, size: float, granularity: float, count: int | None) -> float:
        """Return the distance from an input, in doublings of size, granularity and number of GPUs."""
        known = ((self.size, size), (self.granularity, granularity), (self.gpus, count or self.gpus))
        return sum(abs(math.log2(own / asked)) for own, asked in known)


_FOLDING = "MoE Parallel Folding (arXiv 2504.14960), Table 1, {}"
_LLAMA = "Llama 3 Meets MoE (arXiv 2412.09952), {}"
_MEASURED = (  # model, dense parameters, GPUs, granularity, FSDP + EP, Megatron with folding
    ("Mixtral 8x22B", 22e9, 128, 1.0, 0.234, 0.493),
    ("Llama3 8x70B", 70e9, 256, 1.0, 0.196, 0.416),
    ("Qwen2-57B-A14B", 7.6e9, 64, 7.4, 0.254, 0.390),
    ("8x22B-G8T8", 22e9, 128, 8.0, 0.090, 0.288),
)
OURS = tuple(
    Utilisation(
        mfu=fsdp, what="FSDP with expert parallelism, as upcycle train has it",
        source=_FOLDING.format(model), size=size, gpus=count, granularity=granularity,
    )
    for model, size, count, granularity, fsdp, _ in _MEASURED
)  # fmt: skip
MEGATRON = (
    Utilisation(
        mfu=0.468, what="Megatron, tuned for a measurement (capacity factor 1)",
        source=_LLAMA.format("Table 2"), size=8.03e9, gpus=128, granularity=1.0,
    ),
    # 11 k GPU hours for 100 B tokens are 23 % of the peak. We worked this out; the paper does not print it.
    Utilisation(
        mfu=0.23, what="Megatron, a whole run (capacity factor 4)",
        source=_LLAMA.format("from its GPU hours"), size=8.03e9, gpus=512, granularity=1.0,
    ),
    *(
        Utilisation(
            mfu=mfu, what="Megatron with parallel folding", source=_FOLDING.format(model), size=size,
            gpus=count, granularity=granularity,
        )
        for model, size, count, granularity, _, mfu in _MEASURED
    ),
)  # fmt: skip
MEASURED_ON = "H100"
NEAR = 2.0  # a result covers models so many times larger or smaller, and granularities likewise
NEAR_GPUS = 1.5  # the same for GPUs; utilisation halved between 128 and 512


def total_flops(situation: Situation) -> float:
    """Return the FLOPs of training on the budget, with all attention scores, as published MFU counts them."""
    return situation.asked.tokens * _row_flops(situation, situation.built) / situation.row


def _row_flops(situation: Situation, built: Blueprint | None) -> int:
    """Return the FLOPs of training on a row, with all attention scores; `built` None: the dense model."""
    return 3 * flops_per_row(situation.built.dense, built, situation.lengths, all_scores=True)


def gpu_hours(situation: Situation, mfu: float) -> float:
    """Return the hours that one GPU would take for the budget at the utilisation `mfu`."""
    return total_flops(situation) / (situation.gpu.peak_flops * mfu) / 3600


def statements(situation: Situation) -> list[Statement]:
    """Return the FLOPs, and the hours at the nearest measured utilisation of this engine and of Megatron."""
    count, gpu = situation.asked.gpus, situation.gpu
    flops = total_flops(situation)
    longer = _row_flops(situation, situation.built) / _row_flops(situation, None)
    out = [
        Statement(
            topic="time",
            said=f"{flops:.3g} FLOPs of training, {longer:.2f} times {situation.before}'s on the same tokens",
            value=flops, unit="FLOPs", source="counted: three forward passes, matrix products and attention",
            inside=True, why=situation.row_said,
        )
    ]  # fmt: skip
    granularity = _granularity(situation)
    size = situation.plan.dense_parameters
    for measured in (OURS, MEGATRON):
        published = min(measured, key=lambda one: one.far(size, granularity, count))
        inside, why = _covered(situation, published)
        hours = gpu_hours(situation, published.mfu)
        said = f"{_hours(hours)} of one {gpu.name} at {published.mfu:.1%} of its peak"
        if count is not None:
            said += f", {_period(hours / count)} on {count}"
        out.append(
            Statement(
                topic="time", said=f"{said}: {published.what}", value=hours, unit="GPU hours",
                source=published.source, inside=inside, why=why,
            )
        )  # fmt: skip
    return out


def _covered(situation: Situation, measured: Utilisation) -> tuple[bool | None, str]:
    count, size = situation.asked.gpus, situation.plan.dense_parameters
    where = f"measured on {rounded(measured.size)} dense parameters and {measured.gpus} {MEASURED_ON}"
    if situation.kind != "decoder":
        return False, f"measured on decoder language models, this is {situation.kind}"
    if situation.grows:
        return False, f"{where}; how large a dense model this one would be made from is not known"
    if situation.gpu.name != MEASURED_ON:
        return False, f"{where}, not on {situation.gpu.name}"
    if not _near(size, measured.size, NEAR):
        return False, f"{rounded(size)} dense parameters; {where}"
    granularity = _granularity(situation)
    if not _near(granularity, measured.granularity, NEAR):
        cut = f"1/{measured.granularity:.2g} of the dense width, not 1/{granularity:.2g}"
        return False, f"measured with experts of {cut}"
    if count is None:
        return None, f"{where}; without --gpus it is not known how near that is"
    if not _near(count, measured.gpus, NEAR_GPUS):
        return False, f"{count} GPUs; {where}"
    return True, f"{rounded(size)} dense parameters, {count} {situation.gpu.name}; {where}"


def _near(value: float, measured: float, factor: float) -> bool:
    return measured / factor <= value <= measured * factor


def _granularity(situation: Situation) -> float:
    """Return how many times narrower experts are than the dense network."""
    return max(site.dense_width / site.width for site in situation.built.sites)


def _period(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 48 else _hours(hours)


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{3600 * hours:.3g} seconds"
    return f"{hours:,.0f} hours" if hours >= 100 else f"{hours:.1f} hours"
