"""`upcycle list`: everything a recipe can name, with one line on each and what it needs."""

from __future__ import annotations

from upcycle import families, init, targets
from upcycle.nn import routers

Row = dict[str, str]

ROUTER_INITS: list[Row] = [
    {"name": "normal", "summary": "N(0, std^2)", "needs": "nothing"},
    {"name": "uniform", "summary": "uniform with mean 0 and standard deviation std", "needs": "nothing"},
    {
        "name": "zeros",
        "summary": "all zero: every expert scores alike; ties send all tokens to the same ones",
        "needs": "nothing",
    },
    {"name": "orthogonal", "summary": "orthogonal rows of norm std x sqrt(H)", "needs": "nothing"},
    {
        "name": "grouped",
        "summary": "one normal row for each group of G shards (virtual groups)",
        "needs": "moe.granularity = G",
    },
]


def everything() -> dict[str, list[Row]]:
    """Families, targets, initialisations, routers and router initialisations."""
    dense = [families.find(name) for name in families.names()]
    ways = [(name, routers.find(name)) for name in routers.names()]
    inits = [(name, init.find(name)) for name in init.names()]
    return {
        "families": [
            {
                "name": f.model_type,
                "summary": f.summary,
                "needs": "target " + " or ".join([*f.natives, "upcycled"]),
            }
            for f in dense
        ],
        "targets": targets.catalogue(),
        "initialisations": [{"name": n, "summary": i.summary, "needs": i.needs} for n, i in inits],
        "routers": [{"name": n, "summary": r.summary, "needs": r.needs} for n, r in ways],
        "router initialisations": ROUTER_INITS,
    }
