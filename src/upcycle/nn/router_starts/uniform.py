"""Independent uniform numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.nn.router_starts import RouterStart
from upcycle.tensors.computed import Drawn
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.init import Site


@dataclass(frozen=True, kw_only=True)
class Uniform(RouterStart):
    """Uniform numbers with mean 0 and standard deviation std."""

    summary = "uniform with mean 0 and standard deviation std"

    def weight(self, site: Site, rows: int, dtype: str, std: float) -> Lazy:
        return Drawn((rows, site.hidden), dtype, "uniform", std, site.key("router"))


start = Uniform
