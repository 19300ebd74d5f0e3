"""A weight of zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.nn.router_starts import RouterStart
from upcycle.tensors.computed import Fill
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.init import Site


@dataclass(frozen=True, kw_only=True)
class Zeros(RouterStart):
    """All zeros, whatever std is."""

    summary = "all zero: every expert scores alike; ties send all tokens to the same ones"

    def weight(self, site: Site, rows: int, dtype: str, std: float) -> Lazy:
        return Fill((rows, site.hidden), dtype, 0.0)

    def uniform(self, std: float) -> bool:
        return True


start = Zeros
