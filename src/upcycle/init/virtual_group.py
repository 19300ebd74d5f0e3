"""Granular upcycling: G shards of the dense network, each copied E times (He et al., arXiv 2410.07524)."""

from dataclasses import dataclass

from upcycle.errors import UpcycleError
from upcycle.init import Init, Site, Spread
from upcycle.tensors.feed_forward import FeedForward


@dataclass(frozen=True, kw_only=True)
class VirtualGroup(Init):
    """Expert j is shard j mod G.

    With `router.init = "grouped"`, a token that picks a group gets every shard. N = moe.num_experts counts
    all copies of the shards, E x G in the paper's letters, and top_k = T of them are used. The output is
    scaled by G for gates that sum to one, and by N G / T = E G^2 / T for a softmax over all experts
    (equation 2).

    `scale_mode`: `down` puts the whole factor on the down projection and is exact; `sqrt` shares it between
    up and down, which is exact in a network with a gate and with ReLU, because up is inside the activation
    of one without; `cube_root` puts it on all matrices as published, which is exact for squared ReLU and
    13-46 % off for SwiGLU.
    """

    summary = "the dense FFN cut into G shards, copied (NVIDIA granular upcycling)"
    needs = "moe.granularity = G, router.init = grouped"
    fine_grained = True

    # the matrices that carry the scale: down alone, up and down (sqrt), or all three (cube_root)
    scale_mode: Spread = "down"

    def check(self, site: Site) -> None:
        super().check(site)
        for field, value in (("num_experts", site.num_experts), ("top_k", site.top_k)):
            if value % site.granularity:
                raise UpcycleError(
                    f"virtual_group needs moe.{field} to be a multiple of moe.granularity, so that a "
                    f"token can have every shard; {value} is no multiple of {site.granularity}"
                )

    def expert(self, dense: list[FeedForward], e: int, site: Site) -> FeedForward:
        shard = e % site.granularity
        return dense[0].neurons(shard * site.width, (shard + 1) * site.width)

    def scale(self, site: Site) -> float:
        return float(site.granularity)

    @property
    def spread(self) -> Spread:
        return self.scale_mode

    def warnings(self, site: Site) -> list[str]:
        if site.granularity == 1 or site.grouped_router:
            return []
        return [
            "a token's experts need not hold every shard: virtual_group wants "
            'router.init = "grouped", and a router such as top_k, which scores by its weight alone'
        ]

    def preserves(self, site: Site) -> bool:
        return site.granularity == 1 or (site.grouped_router and self.scale_mode != "cube_root")


init = VirtualGroup
