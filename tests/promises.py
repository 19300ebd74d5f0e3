"""Recipes that may promise to keep the dense function."""

from __future__ import annotations

from upcycle import init
from upcycle.errors import UpcycleError
from upcycle.recipe import Recipe

MOE = {"num_experts": 4, "top_k": 2, "target": "upcycled"}
GRANULAR = {"num_experts": 8, "top_k": 4, "granularity": 2}
SHAPES = [
    ({}, {}),
    ({"top_k": 1}, {}),
    ({"shared_experts": 1}, {}),
    (GRANULAR, {"init": "grouped"}),
    ({**GRANULAR, "shared_experts": 2}, {"init": "grouped"}),
    ({"num_experts": 4, "top_k": 4, "granularity": 4}, {"init": "zeros"}),
]
OPTIONS = [
    {},
    {"ratio": 0.0},
    {"sigma": 0.0},
    {"scale_mode": "sqrt"},
    {"scale_mode": "cube_root"},
    {"output": "expected"},
]
RAW = {"normalize": False, "init": "zeros"}
WAYS = [
    {},
    RAW,
    {**RAW, "rescale": False},
    {"capacity_factor": 4.0},
    {"name": "sigmoid"},
    {"name": "sigmoid", **RAW},
    {"name": "expert_choice", "capacity_factor": 8.0},
    {"name": "expert_choice", "capacity_factor": 8.0, "normalize": False},
    {"name": "expert_choice", "capacity_factor": 1.0, **RAW},
    {"name": "soft"},
]
OF_EACH = [{}, RAW, {"name": "analytic"}]  # those that are tried with every initialisation


def claims() -> list[dict]:
    """Recipes of every initialisation, shape and router that are worth trying; most claim nothing."""
    tables = []
    for name in init.names():
        for moe, start in SHAPES:
            for option in OPTIONS:
                for way in WAYS if name == "copy" else OF_EACH:
                    router = {"std": 0.5, **start, **way}
                    table = {"moe": MOE | moe, "init": {"name": name, **option}, "router": router}
                    try:
                        Recipe.of(table)
                    except UpcycleError:
                        continue  # this initialisation has no such option
                    tables.append(table)
    return tables
