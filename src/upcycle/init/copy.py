"""Sparse Upcycling: every expert is the dense network (Komatsuzaki et al., ICLR 2023)."""

from dataclasses import dataclass

from upcycle.init import Init, Site
from upcycle.tensors.feed_forward import FeedForward


@dataclass(frozen=True, kw_only=True)
class Copy(Init):
    """Every expert is the dense network."""

    summary = "every expert is the dense FFN (Sparse Upcycling)"

    def expert(self, dense: list[FeedForward], e: int, site: Site) -> FeedForward:
        return dense[0]

    def preserves(self, site: Site) -> bool:
        return True


init = Copy
