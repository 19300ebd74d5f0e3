"""Results of papers: when training from scratch overtook upcycling, and upcycling beside dense continuation.

Both are data, with the models on which they were found. The kind of a model, its size, its experts and its
budget decide whether a result covers it. Our own runs are compared with dense continuation as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from upcycle.advice import own_runs
from upcycle.advice.comparison import NEAR, UNREAD, Comparison, inside, near, of_its_init, sizes
from upcycle.advice.experts import Experts
from upcycle.advice.situation import Kind, Situation
from upcycle.advice.statements import Statement, share
from upcycle.system.wording import rounded

MIXTRAL = Experts(count=8, top_k=2, granularity=1, layers=1, routers=("top_k",))
SPARSE_T5 = Experts(count=32, top_k=2, granularity=1, layers=0.5, routers=("expert_choice", "top_k"))
SPARSE_VIT = Experts(count=32, top_k=2, granularity=1, layers=0.5, routers=("expert_choice",))


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """A budget, as a share of the dense model's training, from which an MoE from scratch is better."""

    paper: str
    kind: Kind
    at: float
    unit: Literal["tokens", "cost"]
    sizes: tuple[float, float]  # parameters of the dense models, smallest and largest
    exact: bool  # True if `sizes` are those of the experiment, False if a rule was stated for them
    experts: Experts
    found: str


CROSSOVERS = (
    Crossover(
        paper="OLMoE (arXiv 2409.02060)",
        kind="decoder",
        at=0.25,
        unit="tokens",
        sizes=(1.2e9, 1.2e9),
        exact=True,
        experts=Experts(count=8, granularity=1, routers=("top_k",), complete=False),
        found="OLMo-1B after 2 T tokens, 8 experts: from scratch caught up after 500 B",
    ),
    Crossover(
        paper="Sparse Upcycling (arXiv 2212.05055), Fig. 4",
        kind="encoder-decoder",
        at=1.2,
        unit="cost",
        sizes=(0.248e9, 2.85e9),
        exact=True,
        experts=SPARSE_T5,
        found="T5: from scratch needed about 120 % of the dense budget to catch up",
    ),
    Crossover(
        paper="Skywork-MoE (arXiv 2406.06563)",
        kind="decoder",
        at=2.0,
        unit="cost",
        sizes=(0.1e9, 13e9),
        exact=False,
        experts=Experts(complete=False),
        found="rule: train from scratch where the MoE's budget is twice the dense model's cost or more",
    ),
)


COMPARISONS = (
    Comparison(
        paper="Llama 3 Meets MoE (arXiv 2412.09952), Table 4",
        kind="decoder",
        inits=("copy",),
        sizes=(8.03e9, 8.03e9),
        experts=MIXTRAL,
        tokens=27e9,
        better="upcycling",
        found="Llama 3 8B, 8 experts top-2, 27 B tokens each: 5-shot MMLU 63.3 to 64.0 against 62.4; the "
        "dense model was not run at equal FLOPs",
    ),
    Comparison(
        paper="He et al. (arXiv 2410.07524)",
        kind="decoder",
        inits=("copy",),
        sizes=(15e9, 15e9),
        experts=MIXTRAL,
        tokens=1e12,
        better="upcycling",
        found="Nemotron-4 15B, 8 experts top-2, 1 T tokens each: MMLU 67.6 against 65.3",
    ),
    Comparison(
        paper="FineRMoE (arXiv 2603.13364), Table 1",
        kind="decoder",
        inits=("drop",),
        sizes=(0.49e9, 1.54e9),
        experts=Experts(complete=False),
        tokens=50e9,
        better="dense continuation",
        found="Qwen2.5 0.5B and 1.5B, 50 B tokens each: drop 22.6 and 23.5 on average over ten tasks against "
        "41.3 and 55.2",
    ),
    Comparison(
        paper="FineRMoE (arXiv 2603.13364), Table 1",
        kind="decoder",
        inits=("virtual_group",),
        sizes=(0.49e9, 1.54e9),
        experts=Experts(complete=False),
        tokens=50e9,
        better="dense continuation",
        found="Qwen2.5 0.5B and 1.5B, 50 B tokens each: virtual groups 37.1 and 52.1 on average over ten "
        "tasks against 41.3 and 55.2",
    ),
    Comparison(
        paper="Sparse Upcycling (arXiv 2212.05055)",
        kind="encoder-decoder",
        inits=("copy",),
        sizes=(0.248e9, 0.783e9),
        experts=SPARSE_T5,
        share=(0.1, 0.6),
        better="upcycling",
        found="T5 Base and Large, 32 experts in every other layer: 1.5 to 2 points of SuperGLUE more, for 55 "
        "and 46 % of the dense cost",
    ),
    Comparison(
        paper="Sparse Upcycling (arXiv 2212.05055)",
        kind="vision transformer",
        inits=("copy",),
        sizes=(86e6, 86e6),
        experts=SPARSE_VIT,
        share=(0.1, 0.6),
        better="upcycling",
        found="ViT-B/16, 32 experts in the last half: one point of 10-shot ImageNet took 13 % of the dense "
        "cost upcycled, 58 % dense",
    ),
)


EVERY_COMPARISON = (*COMPARISONS, *own_runs.COMPARISONS)


def distance(situation: Situation, crossover: Crossover) -> float | None:
    """Return the budget over that of the crossover: 1 is at the crossover, 2 is twice as much.

    The result is None if the training of the dense model is not known.
    """
    taken = situation.share_of_tokens if crossover.unit == "tokens" else situation.share_of_cost
    return None if taken is None else taken / crossover.at


def crossover_inside(situation: Situation, crossover: Crossover) -> tuple[bool | None, str]:
    """Return whether a crossover covers a situation, and the reason. None: the source does not tell."""
    if situation.kind != crossover.kind:
        return False, f"found on models of the kind {crossover.kind}, this is {situation.kind}"
    if not situation.copies:
        return False, f"found on copied experts, and init.name = {situation.built.recipe.init.name}"
    if reasons := crossover.experts.unlike(situation):
        return False, "; ".join(reasons)
    if not near(situation.plan.dense_parameters, crossover.sizes, NEAR):
        return False, sizes(situation, crossover.sizes)
    if not crossover.exact:
        return (
            None,
            "stated as a rule; what was read of the source does not say on which runs it rests",
        )
    if not crossover.experts.complete:
        return None, f"{rounded(situation.plan.dense_parameters)} parameters is near; {UNREAD}"
    return True, f"{rounded(situation.plan.dense_parameters)} parameters is near"


def statements(situation: Situation) -> list[Statement]:
    """Return all crossovers, and the comparisons for this kind of model and initialisation."""
    out = []
    for crossover in CROSSOVERS:
        covered, why = crossover_inside(situation, crossover)
        far = distance(situation, crossover)
        if far is None:
            place = "where this budget lies cannot be said without --dense-tokens"
        else:
            what = f"{crossover.unit} of the source" if situation.grows else f"dense {crossover.unit}"
            place = f"this budget is {share(far * crossover.at)} of the {what}"
        out.append(
            Statement(
                topic="from scratch", said=f"{crossover.found}; {place}", value=far, unit="of the crossover",
                source=crossover.paper, inside=covered, why=why,
            )
        )  # fmt: skip
    for comparison in EVERY_COMPARISON:
        if comparison.kind != situation.kind or not of_its_init(situation, comparison):
            continue
        covered, why = inside(situation, comparison)
        out.append(
            Statement(
                topic="dense continuation",
                said=comparison.found,
                source=comparison.paper,
                inside=covered,
                why=why,
            )
        )
    return out
