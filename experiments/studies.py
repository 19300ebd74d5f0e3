"""The studies on a small language model, as tables: what each variant changes, and for how long it trains.

`language.py` runs them: every variant with every seed, from one dense model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Changes = dict[str, Any]  # to the run file of dense continuation
MOE: Changes = {"moe": {"num_experts": 8, "top_k": 2}}


@dataclass(frozen=True)
class Steps:
    """A number of optimizer steps."""

    steps: int


@dataclass(frozen=True)
class Share:
    """As many training FLOPs as this share of those of the dense model's own training."""

    share: float


@dataclass(frozen=True)
class AsMuchAs:
    """As many training FLOPs as another variant, which has a number of steps."""

    variant: str


Budget = Steps | Share | AsMuchAs


@dataclass(frozen=True, kw_only=True)
class Study:
    """One question: its variants, their budgets, and the figure that answers it.

    `budgets` has the budget of every variant, or one for all of them. `shown` maps the label of a curve to
    its variant. `x` counts steps, FLOPs, or FLOPs relative to those of the dense model. If there is a
    `rival`, the table says after which FLOPs it reaches the loss of each point of the others.
    """

    variants: Mapping[str, Changes]
    budgets: Budget | Mapping[str, Budget]
    title: str
    shown: Mapping[str, str]
    x: str
    late: frozenset[str] = field(default=frozenset())  # shown variants whose first loss is far above the rest
    rival: str | None = None

    def budget(self, variant: str) -> Budget:
        """Return the budget of a variant."""
        return self.budgets[variant] if isinstance(self.budgets, Mapping) else self.budgets


STEPS, FLOPS, RELATIVE = (
    "steps of 2,048 tokens",
    "training FLOPs",
    "training FLOPs / those of the dense model",
)


def _drop(ratio: float, indices: str = "shared") -> Changes:
    """Eight experts with a share of their neurons redrawn; 0 is a copy."""
    return {**MOE, "init": {"name": "drop", "ratio": ratio, "indices": indices}}


def _drop_upcycling() -> Study:
    """When does it begin to pay to redraw a share r of every expert (Drop-Upcycling)?"""
    ratios = (0.1, 0.25, 0.5)
    per_layer = {
        "r0": _drop(0.0),
        **{f"r{r:g}_{indices}": _drop(r, indices) for r in ratios for indices in ("shared", "independent")},
        "r1": _drop(1.0),
    }
    pooled = {
        f"{name}_pooled": {**changes, "router": {"balance_loss": "pooled"}}
        for name, changes in per_layer.items()
    }
    shown = ("r0", "r0.1_shared", "r0.25_shared", "r0.5_shared", "r1")
    return Study(
        variants=per_layer | pooled,
        budgets=Steps(160),
        title="Share of neurons redrawn",
        shown={name: name for name in shown},
        x=STEPS,
        late=frozenset(shown),
    )


def _extra_compute() -> Study:
    """What does extra compute buy, and when does a Mixture of Experts from scratch catch up?

    The questions are those of Sparse Upcycling, in a decoder.
    """
    variants: dict[str, Changes] = {"dense": {}, "upcycled": MOE, "scratch": {**MOE, "from_scratch": True}}
    return Study(
        variants=variants,
        budgets={"dense": Share(0.64), "upcycled": Share(0.64), "scratch": Share(1.28)},
        title="What extra compute buys",
        shown={name: name for name in variants},
        x=RELATIVE,
        late=frozenset({"scratch"}),
        rival="scratch",
    )


def _llama3_meets_moe() -> Study:
    """The recipe of Llama 3 Meets MoE at small scale, with the equal-FLOPs control that its paper lacks.

    Eight experts, top-2, with and without capacity, and with both orders of softmax and top-k, against dense
    continuation for equal tokens and for equal FLOPs. Without renormalisation nothing compensates for
    weights below one, as in the paper's ablation.
    """
    orders = {"topk_softmax": True, "softmax_topk": False}  # whether the softmax is over the top-k alone
    capacities = {"dropless": None, "cf1": 1.0, "cf2": 2.0, "cf4": 4.0}

    def moe(normalize: bool, factor: float | None) -> Changes:
        room = {} if factor is None else {"capacity_factor": factor}
        return {
            "moe": {**MOE["moe"], "target": "upcycled"},
            "router": {"name": "top_k", "normalize": normalize, "rescale": False, **room},
        }

    variants: dict[str, Changes] = {
        "dense_equal_tokens": {},
        "dense_equal_flops": {},
        **{
            f"{order}_{capacity}": moe(normalize, factor)
            for order, normalize in orders.items()
            for capacity, factor in capacities.items()
        },
    }
    budgets: dict[str, Budget] = dict.fromkeys(variants, Steps(120))
    return Study(
        variants=variants,
        budgets=budgets | {"dense_equal_flops": AsMuchAs("topk_softmax_dropless")},
        title="Capacity and router order",
        shown={
            "dense": "dense_equal_flops", "top-k first": "topk_softmax_dropless",
            "top-k first, room for 1": "topk_softmax_cf1", "softmax first": "softmax_topk_dropless",
        },
        x=FLOPS,
    )  # fmt: skip


STUDIES: dict[str, Study] = {
    "drop_upcycling": _drop_upcycling(),
    "extra_compute": _extra_compute(),
    "llama3_meets_moe": _llama3_meets_moe(),
}
