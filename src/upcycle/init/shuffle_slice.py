"""The method of Qwen2-57B-A14B: replicate, shuffle along the neurons, slice (arXiv 2407.10671)."""

from dataclasses import dataclass
from typing import Annotated, Literal

from upcycle.init import Init, Site
from upcycle.init.drop import redraw
from upcycle.settings import Within
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.positions import Order


@dataclass(frozen=True, kw_only=True)
class ShuffleSlice(Init):
    """ceil(N / G) copies of the dense network, each with its neurons in random order and cut into G experts.

    What is left of the last copy is discarded. `redraw` is the share of each expert's neurons that are drawn
    anew afterwards (0.5 in the report, which does not say how; here as in `drop` with shared indices).
    `output`: `as_is` leaves the experts' outputs alone, `expected` multiplies them by G, so that the mean
    over experts is the dense output.
    """

    summary = "shuffled copies cut into narrow experts (Qwen2-57B-A14B)"
    needs = "moe.granularity = G"
    fine_grained = True

    # share of each expert's neurons that are drawn anew afterwards
    redraw: Annotated[float, Within("[0, 1]")] = 0.0
    # as_is leaves the outputs alone; expected multiplies them by G
    output: Literal["as_is", "expected"] = "as_is"

    def expert(self, dense: list[FeedForward], e: int, site: Site) -> FeedForward:
        replica, piece = divmod(e, site.granularity)
        order = site.key("shuffle", replica)
        start = piece * site.width
        cut = dense[0].take(Order(order, site.dense_width, start, start + site.width))
        return redraw(cut, self.redraw, e, site, shared=True) if self._redrawn(site) else cut

    def scale(self, site: Site) -> float:
        return float(site.granularity) if self.output == "expected" else 1.0

    def preserves(self, site: Site) -> bool:
        return site.granularity == 1 and not self._redrawn(site)

    def _redrawn(self, site: Site) -> int:
        return int(self.redraw * site.width)


init = ShuffleSlice
