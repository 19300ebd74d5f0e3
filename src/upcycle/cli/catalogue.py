"""`upcycle list`: everything a recipe can name, with one line on each and what it needs."""

from __future__ import annotations

from upcycle import families, init, targets
from upcycle.nn import router_starts, routers
from upcycle.targets import natives

Row = dict[str, str]


def everything() -> dict[str, list[Row]]:
    """Families, targets, initialisations, routers and router initialisations."""
    dense = [families.find(name) for name in families.names()]
    moe = [natives.find(name) for name in natives.names()]
    ways = [(name, routers.find(name)) for name in routers.names()]
    inits = [(name, init.find(name)) for name in init.names()]
    starts = [router_starts.find(name) for name in router_starts.names()]
    return {
        "families": [
            {
                "name": f.model_type,
                "summary": f.summary,
                "needs": "target " + " or ".join([*f.natives, "upcycled"]),
            }
            for f in dense
        ],
        "targets": [
            {
                "name": n.model_type,
                "summary": n.summary,
                "needs": "experts in every layer" if n.dense_layers is None else "nothing",
            }
            for n in moe
        ]
        + [
            {"name": name, "summary": kind.summary, "needs": kind.needs}
            for name in targets.names()
            if name != "native" and (kind := targets.kind(name))
        ],
        "initialisations": [{"name": n, "summary": i.summary, "needs": i.needs} for n, i in inits],
        "routers": [{"name": n, "summary": r.summary, "needs": r.needs} for n, r in ways],
        "router initialisations": [{"name": s.name, "summary": s.summary, "needs": s.needs} for s in starts],
    }
