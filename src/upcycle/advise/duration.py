"""How long training takes: FLOPs over peak FLOP/s and the utilisation (MFU) that was published."""

from __future__ import annotations

from dataclasses import dataclass

from upcycle.advise.situation import Situation
from upcycle.advise.statements import Statement, number
from upcycle.cost import flops_per_row


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """A share of the peak that was reached on H100, of the FLOPs of a step with all attention scores."""

    mfu: float
    what: str
    source: str


BEST = Utilisation(
    mfu=0.468,
    what="Megatron at its best (capacity factor 1)",
    source="Llama 3 Meets MoE (arXiv 2412.09952), Table 2",
)
OURS = Utilisation(
    mfu=0.234,
    what="FSDP with expert parallelism, as upcycle train has it",
    source="MoE Parallel Folding (arXiv 2504.14960), Table 1, Mixtral 8x22B",
)
FINE = Utilisation(
    mfu=0.09,
    what="FSDP with expert parallelism and fine-grained experts",
    source="MoE Parallel Folding (arXiv 2504.14960), Table 1, 8x22B-G8T8",
)
FINE_GRAINED = 8  # granularity from which experts are as narrow as in FINE
MEASURED_ON = ("H100",)
GPUS = (64, 512)
SIZES = (4e9, 140e9)  # dense parameters: half of the smallest model's, twice the largest's


def total_flops(situation: Situation) -> float:
    """FLOPs of training on the budget, counted as published MFU counts them: all attention scores."""
    row = 3 * flops_per_row(
        situation.built.dense, situation.built, situation.lengths, all_scores=True
    )  # fmt: skip
    return situation.asked.tokens * row / situation.row


def gpu_hours(situation: Situation, mfu: float) -> float:
    """Hours of one GPU for the budget."""
    return total_flops(situation) / (situation.gpu.peak_flops * mfu) / 3600


def statements(situation: Situation) -> list[Statement]:
    """FLOPs, and hours at the utilisation of this engine and at the best that was published."""
    count, gpu = situation.asked.gpus, situation.gpu
    flops, longer = total_flops(situation), situation.moe_flops / situation.dense_flops
    out = [
        Statement(
            topic="time",
            said=f"{flops:.3g} FLOPs of training, {longer:.2f} times the dense model's on the same tokens",
            value=flops, unit="FLOPs", source="counted: three forward passes, matrix products and attention",
            inside=True, why=f"rows of {max(situation.lengths.values()):,} tokens",
        )
    ]  # fmt: skip
    inside, why = _covered(situation)
    ours = FINE if situation.built.recipe.moe.granularity >= FINE_GRAINED else OURS
    for published in (ours, BEST):
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


def _covered(situation: Situation) -> tuple[bool, str]:
    count, size = situation.asked.gpus, situation.plan.dense_parameters
    if situation.kind != "decoder":
        return False, f"measured on decoder language models, this is {situation.kind}"
    if situation.gpu.name not in MEASURED_ON:
        return False, f"measured on H100, not on {situation.gpu.name}"
    if not SIZES[0] <= size <= SIZES[1]:
        return False, f"{number(size)} dense parameters, measured on 8 B to 70 B; small models reach less"
    if count is not None and not GPUS[0] <= count <= GPUS[1]:
        return False, f"{count} GPUs, measured on {GPUS[0]} to {GPUS[1]}"
    return True, f"{number(size)} dense parameters on {situation.gpu.name}"


def _period(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 48 else _hours(hours)


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{3600 * hours:.3g} seconds"
    return f"{hours:,.0f} hours" if hours >= 100 else f"{hours:.1f} hours"
