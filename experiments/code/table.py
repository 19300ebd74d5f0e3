"""The variants on the code corpus: each as changes to the run file of the dense continuation.

A variant continues from a start of `dense.py` (10 to 320 tokens per parameter) for 30 % of that start's own
training FLOPs. The learning rate stays at that of the start, and falls to zero in the last quarter. A run
from scratch gets the FLOPs of the start as well, and its rate falls over the same FLOPs at the end.
"""

from __future__ import annotations

from continuation import CARRIED, Changes

_TOP_2 = {"num_experts": 8, "top_k": 2}
_HALVES = {"num_experts": 16, "top_k": 2, "granularity": 2}
_QUARTERS = {"num_experts": 32, "top_k": 4, "granularity": 4}
_EVERY_OTHER = {"layers": "every_other", "target": "upcycled"}
_IN_GROUPS: Changes = {"init": {"name": "virtual_group"}, "router": {"init": "grouped"}}
_SLICES: Changes = {"init": {"name": "shuffle_slice"}}


def _drop(ratio: float, indices: str = "shared") -> Changes:
    return {"moe": _TOP_2, "init": {"name": "drop", "ratio": ratio, "indices": indices}}


# Dense continuation, two ways at equal FLOPs per token, copies, redrawn copies, and an MoE from scratch.
CORE: dict[str, Changes] = {
    "dense": {},
    "virtual_group": {"moe": _HALVES} | _IN_GROUPS,
    "shuffle_slice": {"moe": _HALVES} | _SLICES,
    "copy": {"moe": _TOP_2},
    "drop_0.5": _drop(0.5),
    "scratch": {
        "moe": _HALVES, "init": {"name": "virtual_group"}, "from_scratch": True, "schedule": {"warmup": 200},
    },
}  # fmt: skip

# Each changes one factor of the core.
FACTORS: dict[str, Changes] = {
    "noise": {"moe": _TOP_2, "init": {"name": "noise"}},
    "drop_0.1": _drop(0.1),
    "drop_0.25": _drop(0.25),
    "drop_0.5_independent": _drop(0.5, "independent"),
    "virtual_group_4": {"moe": _QUARTERS} | _IN_GROUPS,
    "virtual_group_ungrouped": {"moe": _HALVES, "init": {"name": "virtual_group"}},
    "shuffle_slice_redrawn": {"moe": _HALVES, "init": {"name": "shuffle_slice", "redraw": 0.5}},
    "copy_4_experts": {"moe": {"num_experts": 4, "top_k": 2}},
    "copy_16_experts": {"moe": {"num_experts": 16, "top_k": 2}},
    "copy_32_experts": {"moe": {"num_experts": 32, "top_k": 2}},
    "copy_top_1": {
        "moe": {"num_experts": 8, "top_k": 1, "target": "upcycled"}, "router": {"normalize": False},
    },
    "copy_softmax_first": {"moe": _TOP_2 | {"target": "upcycled"}, "router": {"normalize": False}},
    "copy_every_other": {"moe": _TOP_2 | _EVERY_OTHER},
    "virtual_group_equal_seconds": {"moe": _HALVES} | _IN_GROUPS,
    "shuffle_slice_equal_seconds": {"moe": _HALVES} | _SLICES,
    "split_8": {"moe": {"num_experts": 8, "top_k": 4, "granularity": 8}, "init": {"name": "split"}},
    "virtual_group_small_router": {
        "moe": _HALVES, "init": {"name": "virtual_group"}, "router": {"init": "grouped", "std": 0.002},
    },
    "virtual_group_warm": {"moe": _HALVES, "schedule": {"warmup": 200}} | _IN_GROUPS,
    "virtual_group_slow_router": {"moe": _HALVES, "optimizer": {"router_rate": 0.1}} | _IN_GROUPS,
    # Moments are carried to copies alone, and dense continuation shows what they are worth without experts.
    "dense_moments": CARRIED,
    "copy_moments": {"moe": _TOP_2} | CARRIED,
}  # fmt: skip

# What did best among the factors, two at once.
TOGETHER: dict[str, Changes] = {
    "virtual_group_every_other": {"moe": _HALVES | _EVERY_OTHER} | _IN_GROUPS,
    "shuffle_slice_every_other": {"moe": _HALVES | _EVERY_OTHER} | _SLICES,
    "copy_every_other_moments": {"moe": _TOP_2 | _EVERY_OTHER} | CARRIED,
}  # fmt: skip

VARIANTS = CORE | FACTORS | TOGETHER

# Each has a figure of its own, from every start that a factor of it has run from.
QUESTIONS = {
    "dip at the start": [
        "dense",
        "virtual_group",
        "virtual_group_small_router",
        "virtual_group_warm",
        "virtual_group_slow_router",
    ],
    "number of experts": ["dense", "copy", "copy_4_experts", "copy_16_experts", "copy_32_experts"],
    "share redrawn": ["dense", "copy", "drop_0.1", "drop_0.25", "drop_0.5", "drop_0.5_independent"],
    "moments": [
        "dense",
        "copy",
        "dense_moments",
        "copy_moments",
        "copy_every_other",
        "copy_every_other_moments",
    ],
    "width of experts": ["dense", "virtual_group", "virtual_group_ungrouped", "virtual_group_4"],
    "copies": ["dense", "copy", "noise", "copy_every_other", "copy_top_1", "copy_softmax_first"],
    "slices": ["dense", "virtual_group", "shuffle_slice", "shuffle_slice_redrawn"],
    "two at once": [
        "dense",
        "virtual_group",
        "copy_every_other",
        "shuffle_slice",
        "virtual_group_every_other",
        "shuffle_slice_every_other",
    ],
}

# A step of these experts takes 1.25 times the seconds of the dense step (benchmarks/equal_flops.py).
SHORTER = {"virtual_group_equal_seconds": 1.25, "shuffle_slice_equal_seconds": 1.25}
