"""Independent normal numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.nn.router_starts import RouterStart
from upcycle.tensors.computed import Drawn
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.init import Site


@dataclass(frozen=True, kw_only=True)
class Normal(RouterStart):
    """N(0, std^2) everywhere."""

    summary = "N(0, std^2)"

    def weight(self, site: Site, rows: int, dtype: str, std: float) -> Lazy:
        return Drawn((rows, site.hidden), dtype, "normal", std, site.key("router"))


start = Normal
