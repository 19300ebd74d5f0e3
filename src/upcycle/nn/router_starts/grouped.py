"""One row per group of shards (virtual groups; He et al., arXiv 2410.07524)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from upcycle.errors import UpcycleError
from upcycle.nn.router_starts import RouterStart
from upcycle.tensors.computed import Drawn
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.moved import Take
from upcycle.tensors.positions import Given

if TYPE_CHECKING:
    from upcycle.init import Site


@dataclass(frozen=True, kw_only=True)
class Grouped(RouterStart):
    """N(0, std^2), with G equal rows in turn: one for each shard of the dense network."""

    summary = "one normal row for each group of G shards (virtual groups)"
    needs = "moe.granularity = G"
    groups = True

    def weight(self, site: Site, rows: int, dtype: str, std: float) -> Lazy:
        groups, rest = divmod(rows, site.granularity)
        if rest:
            raise UpcycleError(
                f"router.init = grouped makes {site.granularity} rows alike in turn (moe.granularity), and "
                f"this router has {rows}; take out moe.universal_experts, or use normal"
            )
        each = Given(tuple(np.repeat(np.arange(groups), site.granularity).tolist()))
        return Take(Drawn((groups, site.hidden), dtype, "normal", std, site.key("router")), 0, each)

    def check(self, num_experts: int, granularity: int) -> None:
        if num_experts % granularity:
            raise UpcycleError(
                f"router.init = grouped needs moe.num_experts to be a multiple of moe.granularity; "
                f"{num_experts} is no multiple of {granularity}"
            )


start = Grouped
