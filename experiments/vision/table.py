"""The variants on images: each as changes to the run file of the dense continuation.

As in Sparse Upcycling, the last half of the blocks gets experts, Expert Choice with weights that sum to one,
and the moments of the optimizer are carried. A group of tokens is an image: 16 patches and the class token.
"""

from __future__ import annotations

from continuation import CARRIED, Changes, expert_choice

LAYERS = "last_half"
_HALVES = {"num_experts": 16, "top_k": 2, "granularity": 2, "layers": LAYERS, "target": "upcycled"}

# Dense continuation, Expert Choice at its FLOPs per image (C = 1) and above (C = 2), and the two best of the
# experiments on code, also at its FLOPs. The optimizer of these is fresh: moments go to copies alone.
CORE: dict[str, Changes] = {
    "dense": CARRIED,
    "expert_choice_1": expert_choice(1.0, LAYERS) | CARRIED,
    "expert_choice_2": expert_choice(2.0, LAYERS) | CARRIED,
    "virtual_group": {"moe": _HALVES, "init": {"name": "virtual_group"}, "router": {"init": "grouped"}},
    "shuffle_slice": {"moe": _HALVES, "init": {"name": "shuffle_slice"}},
}

# Each changes one factor of the core.
FACTORS: dict[str, Changes] = {
    "expert_choice_1_all": expert_choice(1.0, "all") | CARRIED,
    "expert_choice_2_fresh": expert_choice(2.0, LAYERS),
    "expert_choice_1_16_experts": expert_choice(1.0, LAYERS, experts=16) | CARRIED,
    "scratch": expert_choice(2.0, LAYERS) | {"from_scratch": True, "schedule": {"warmup": 200}},
}

VARIANTS = CORE | FACTORS
