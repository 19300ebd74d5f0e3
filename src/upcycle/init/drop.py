"""Drop-Upcycling: part of each expert is drawn anew (Nakamura et al., ICLR 2025, section 3.3)."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from upcycle.init import Init, Site
from upcycle.settings import Within
from upcycle.tensors.computed import Redraw
from upcycle.tensors.feed_forward import FeedForward


@dataclass(frozen=True, kw_only=True)
class Drop(Init):
    """floor(ratio x I) neurons of each expert are redrawn from N(mu, sigma^2) of the part that they replace.

    `indices`: `shared` redraws the same neurons in gate, up and down, as the paper's text says; `independent`
    draws the positions per matrix, as the code behind its published numbers does. At ratio 0.5, `shared`
    leaves half of the neurons untouched and `independent` an eighth. Ratio 0 is `copy`.
    """

    summary = "a share of each expert's neurons redrawn (Drop-Upcycling)"

    ratio: Annotated[float, Within("[0, 1]")] = 0.5  # share of the neurons of each expert that are drawn anew
    # shared redraws the same neurons in gate, up and down (the paper's text), independent others in each (its
    # code)
    indices: Literal["shared", "independent"] = "shared"

    def expert(self, dense: list[FeedForward], e: int, site: Site) -> FeedForward:
        if not math.floor(self.ratio * site.dense_width):
            return dense[0]
        return redraw(dense[0], self.ratio, e, site, shared=self.indices == "shared")

    def preserves(self, site: Site) -> bool:
        return not math.floor(self.ratio * site.dense_width)

    def warnings(self, site: Site) -> list[str]:
        if self.ratio < 0.25:
            return []
        return [
            f"drop with ratio {self.ratio:g} damages the model it starts from: under some 50-100 B "
            f"tokens of further training published runs end below the dense model; a ratio of 0.1 or "
            f"less, or copy, is the choice for a smaller budget"
        ]


def redraw(network: FeedForward, ratio: float, e: int, site: Site, *, shared: bool) -> FeedForward:
    """Return `network` with floor(ratio x width) of its neurons drawn anew for expert `e`."""

    def matrix(name: str, axis: int, m):  # type: ignore[no-untyped-def]
        place = ("dropped", e) if shared else (name, "dropped", e)
        positions = site.sample(ratio, network.width, *place)
        return Redraw(m, axis, positions, site.key(name, "redrawn", e))

    return network.map(matrix)


init = Drop
