"""The recipe of Llama 3 Meets MoE at small scale, with the control that the paper leaves out.

The variants have eight experts, top-2, with and without capacity, and with both orders of softmax and top-k.
The control is dense continuation with equal tokens and with equal FLOPs. The script trains every variant with
every seed from one dense model, and gathers `results.json`; runs that are already there are not repeated.

    python experiments/llama3_meets_moe/run.py --checkpoint stories260k --texts FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
import figure  # noqa: E402
import language  # noqa: E402

STEPS = 120
CAPACITIES: dict[str, dict[str, Any]] = {
    "dropless": {}, "cf1": {"capacity_factor": 1.0}, "cf2": {"capacity_factor": 2.0},
    "cf4": {"capacity_factor": 4.0},
}  # fmt: skip
ORDERS = {"topk_softmax": True, "softmax_topk": False}  # whether the softmax is over the top-k alone


def moe(order: str, capacity: str) -> dict[str, Any]:
    """Return the recipe of eight copies.

    Without renormalisation nothing compensates for weights below one, as in the paper's ablation.
    """
    router = {"name": "top_k", "normalize": ORDERS[order], "rescale": False, **CAPACITIES[capacity]}
    return {"moe": {**language.MOE["moe"], "target": "upcycled"}, "router": router}


VARIANTS: dict[str, dict[str, Any]] = {
    "dense_equal_tokens": {},
    "dense_equal_flops": {},
    **{f"{order}_{capacity}": moe(order, capacity) for order in ORDERS for capacity in CAPACITIES},
}


def main() -> None:
    """Run the missing jobs, gather the results, and print the table."""
    given = language.options(__doc__, HERE)
    language.base(given)
    cost = {name: language.flops_per_step(changes, given) for name, changes in VARIANTS.items()}
    steps = dict.fromkeys(VARIANTS, STEPS)
    steps["dense_equal_flops"] = round(STEPS * cost["topk_softmax_dropless"] / cost["dense_equal_flops"])
    runs = common.gather(
        HERE / "results.json",
        [(name, seed) for seed in range(given.seeds) for name in VARIANTS],
        lambda name, seed: language.go(name, VARIANTS[name], seed, steps[name], given),
        list(VARIANTS),
        given.jobs,
        {"dense_training": language.base_curve(given)},
    )
    print(f"{'variant':24} {'start':>8} {'end':>8} {'error':>8} {'left behind':>12}")
    for name in VARIANTS:
        (start, _), (end, error) = language.losses(runs, name, 0), language.losses(runs, name)
        left = [x for r in runs if r["variant"] == name for x in r["left_behind"]]
        behind = f"{sum(left) / len(left):.1%}" if left else ""
        print(f"{name:24} {start:8.4f} {end:8.4f} {error:8.4f} {behind:>12}")
    shown = {
        "dense": "dense_equal_flops", "top-k first": "topk_softmax_dropless",
        "top-k first, room for 1": "topk_softmax_cf1", "softmax first": "softmax_topk_dropless",
    }  # fmt: skip
    curves = {
        label: [[(flops, loss) for _, flops, loss in r["curve"]] for r in runs if r["variant"] == name]
        for label, name in shown.items()
    }
    y = "held-out loss (nats per token)"
    figure.write(
        HERE / "figure.png", "Capacity and router order", curves, "training FLOPs", y, counted="power"
    )


if __name__ == "__main__":
    main()
