"""The variants on a T5: each as changes to the run file of the dense continuation.

Every other block of the encoder gets experts, Expert Choice among the 128 tokens of a row. The decoder stays
dense, but for the recipe of Sparse Upcycling (`paper`). The optimizer is fresh, as in that paper.
"""

from __future__ import annotations

from continuation import Changes, expert_choice

DENSE_DECODER: Changes = {"decoder": {"moe": {"layers": []}}}

LAYERS = "every_other"
_HALVES = {"num_experts": 16, "top_k": 2, "granularity": 2, "layers": LAYERS, "target": "upcycled"}

# Dense continuation, and Expert Choice at its FLOPs per row (C = 1) and above (C = 2).
CORE: dict[str, Changes] = {
    "dense": {},
    "expert_choice_1": expert_choice(1.0, LAYERS) | DENSE_DECODER,
    "expert_choice_2": expert_choice(2.0, LAYERS) | DENSE_DECODER,
}

# Each changes one factor of the core. The first two are the best of the experiments on code at equal FLOPs.
FACTORS: dict[str, Changes] = {
    "virtual_group": {
        "moe": _HALVES, "init": {"name": "virtual_group"}, "router": {"init": "grouped"}, **DENSE_DECODER,
    },
    "shuffle_slice": {"moe": _HALVES, "init": {"name": "shuffle_slice"}, **DENSE_DECODER},
    "paper": {
        "moe": {"num_experts": 8, "top_k": 2, "layers": LAYERS, "target": "upcycled"},
        "router": {"name": "expert_choice", "capacity_factor": 2.0, "normalize": False, "rescale": False},
        "decoder": {"router": {"name": "top_k", "capacity_factor": 2.0, "rounding": "flaxformer"}},
    },
    "expert_choice_1_32_experts": expert_choice(1.0, LAYERS, experts=32) | DENSE_DECODER,
    "scratch": {
        **expert_choice(2.0, LAYERS), **DENSE_DECODER, "from_scratch": True, "schedule": {"warmup": 200},
    },
}  # fmt: skip

VARIANTS = CORE | FACTORS
