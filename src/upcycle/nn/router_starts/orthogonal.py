"""Orthogonal rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.nn.router_starts import RouterStart
from upcycle.tensors.computed import Drawn
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.init import Site


@dataclass(frozen=True, kw_only=True)
class Orthogonal(RouterStart):
    """Orthogonal rows of norm std x sqrt(H); orthogonal columns if there are more rows than columns."""

    summary = "orthogonal rows of norm std x sqrt(H)"

    def weight(self, site: Site, rows: int, dtype: str, std: float) -> Lazy:
        return Drawn((rows, site.hidden), dtype, "orthogonal", std, site.key("router"))


start = Orthogonal
