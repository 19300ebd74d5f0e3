"""The settings of experts behind a published result, and how the experts asked for differ from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from upcycle.advice.situation import Situation

GROWN = "found on experts made of a dense model, and [grow] copies those that the source has"


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The settings of the experts in a published result.

    A field that is None was free or is not known. If it is not known, `complete` is False. `routers` has one
    name for each stack. `layers` is the share of all layers that have experts. `top_k` is that of token
    choice. For expert choice it is the capacity factor, the number of experts of a token on average. No
    result has shared experts.
    """

    count: int | None = None
    top_k: int | None = None
    granularity: int | None = None
    layers: float | None = None
    routers: tuple[str, ...] | None = None
    universal: int = 0  # universal experts of MoE Jetpack
    complete: bool = True

    def unlike(self, situation: Situation) -> list[str]:
        """Return a reason for every setting in which the experts asked for differ."""
        if situation.grows:
            return [GROWN]
        built = situation.built
        recipes = {site.stack: built.recipe.at(site.stack) for site in built.sites}
        counts = {site.num_experts for site in built.sites}
        chosen = {_chosen(site.top_k, recipes[site.stack].router) for site in built.sites}
        cut = {site.dense_width / site.width for site in built.sites}
        found = []
        if self.count is not None and counts != {self.count}:
            found.append(f"found with {self.count} experts, not {_listed(counts)}")
        if self.top_k is not None and chosen != {self.top_k}:
            found.append(f"found with {self.top_k} experts a token, not {_listed(chosen)}")
        if self.granularity is not None and cut != {self.granularity}:
            what = "whole experts" if self.granularity == 1 else f"granularity {self.granularity}"
            found.append(f"found with {what}, not with 1/{_listed(cut)} of the dense width")
        if {site.universal_experts for site in built.sites} != {self.universal} or built.shared_width:
            universal = f"with {self.universal}" if self.universal else "without"
            found.append(f"found {universal} universal experts, and without shared ones")
        share = situation.plan.num_moe_layers / situation.plan.num_layers
        if self.layers is not None and abs(share - self.layers) > 0.05:
            found.append(f"found with experts in {self.layers:.0%} of the layers, not in {share:.0%}")
        routers = tuple(built.recipe.at(stack.name).router.name for stack in built.dense.stacks)
        if self.routers is not None and routers != self.routers:
            named = (" and ".join(dict.fromkeys(names)) for names in (self.routers, routers))
            found.append("found with router.name = {}, not {}".format(*named))
        return found


def _chosen(top_k: int, router: object) -> float | None:
    """Return the number of experts of a token, on average if experts choose; None for routers of slots."""
    name, factor = getattr(router, "name", ""), getattr(router, "capacity_factor", None)
    if name in ("top_k", "sigmoid"):
        return top_k
    return factor if name == "expert_choice" else None


def _listed(values: Iterable[float | None]) -> str:
    shown = sorted("slots" if v is None else f"{v:g}" for v in values)
    return " or ".join(shown)
