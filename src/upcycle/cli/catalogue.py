"""`upcycle list`: every name that a recipe can use, with a one-line description and its requirements."""

from __future__ import annotations

from upcycle import families, init, targets
from upcycle.nn import router_starts, routers

Row = dict[str, str]


def everything() -> dict[str, list[Row]]:
    """Return the families, targets, initialisations, routers and router initialisations."""
    dense = [families.find(name) for name in families.names()]
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
        "targets": targets.catalogue(),
        "initialisations": [{"name": n, "summary": i.summary, "needs": i.needs} for n, i in inits],
        "routers": [{"name": n, "summary": r.summary, "needs": r.needs} for n, r in ways],
        "router initialisations": [{"name": s.name, "summary": s.summary, "needs": s.needs} for s in starts],
    }
