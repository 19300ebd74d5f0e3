"""The dense network cut into a shared expert and balanced experts (CMoE; Pei et al., arXiv 2502.04416)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from upcycle.errors import UpcycleError
from upcycle.init import Site
from upcycle.init._assignment import balanced
from upcycle.init._from_statistics import FromStatistics
from upcycle.records.statistics import Statistics
from upcycle.system.once import once
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.positions import Computed, Positions


@dataclass(frozen=True, kw_only=True)
class CMoE(FromStatistics):
    """Neurons that are active for most tokens are the shared expert, and the rest are dealt out once.

    A neuron is active for a token if it is among the K_a with the largest |h|, h = act(g^ x^) (u^ x^), with
    token and rows of length one; `upcycle calibrate` counts how often, and how often two of them are
    (co_marker). The moe.shared_experts / moe.granularity of the neurons with the highest rates are the shared
    expert. The next highest, one for each expert, are seeds. The rest goes to the seeds by one balanced
    assignment, at the least total L1 distance between the neurons' activity over the tokens. The neuron
    nearest to the mean of its expert represents it in the router `analytic`.

    An expert's output is multiplied by K for weights that sum to one, so that the chosen parts are summed, as
    in `split`.
    """

    summary = "a shared expert of the most active neurons, balanced experts of the rest (CMoE)"
    needs = "moe.granularity = moe.num_experts + moe.shared_experts, init.statistics = FILE"
    fine_grained = True
    chooses_shared = True
    statistics: str = ""  # the file of `upcycle calibrate --collect co_marker`

    @property
    def collect(self) -> str:
        return "co_marker"

    def check(self, site: Site) -> None:
        super().check(site)
        shared = site.shared_width * site.granularity // site.dense_width
        if site.granularity != site.num_experts + shared:
            raise UpcycleError(
                f"cmoe deals every neuron out once: moe.granularity must be moe.num_experts + "
                f"moe.shared_experts, and it is {site.granularity} for {site.num_experts} + {shared}"
            )

    def expert(self, dense: list[FeedForward], e: int, site: Site) -> FeedForward:
        return dense[0].take(self._positions(site, f"expert {e}", site.width, lambda found: found.experts[e]))

    def shared(self, dense: list[FeedForward], site: Site) -> FeedForward:
        return dense[0].take(self._positions(site, "shared", site.shared_width, lambda found: found.shared))

    def representatives(self, site: Site) -> Positions:
        return self._positions(site, "representatives", site.num_experts, lambda found: found.representatives)

    def _positions(self, site, who, count, part) -> Computed:  # type: ignore[no-untyped-def]
        measured, shape = self.measured, (site.num_experts, site.shared_width)
        measured.info("neurons", site.stack, site.layer, "co_marker")
        about = [self.name, measured.digest, site.stack, site.layer, *shape, who]
        return Computed(lambda: part(_groups(measured, site.stack, site.layer, *shape)), count, about)

    def scale(self, site: Site) -> float:
        return float(site.top_k)

    def preserves(self, site: Site) -> bool:
        return site.top_k == site.num_experts and (site.even_weights or site.uniform_router)

    def working_memory(self, width: int, hidden: int) -> int:
        return 2 * 8 * width * width


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The neurons of the shared expert, those of each expert, all ascending, and the representatives [E]."""

    shared: np.ndarray
    experts: list[np.ndarray]
    representatives: np.ndarray


@once(maxsize=4)
def _groups(measured: Statistics, stack: str, layer: int, num_experts: int, shared_width: int) -> Groups:
    share = measured.of("neurons", stack, layer, "co_marker").astype(np.float64)
    return groups(np.rint(share * measured.provenance["tokens"][stack]), num_experts, shared_width)


def groups(both: np.ndarray, num_experts: int, shared_width: int) -> Groups:
    """Return the groups for the numbers of tokens [I, I] for which both of two neurons were active.

    Activity is 0 or 1, so distances need nothing but these: |a - b| summed over tokens is n_a + n_b - 2 n_ab,
    and m times that to the mean of m neurons is m n_a - 2 (sum of n_ab) + what all neurons have in common.
    """
    both = both.astype(np.int64)
    rates = np.diag(both)
    order = np.argsort(-rates, kind="stable")
    shared, rest = np.sort(order[:shared_width]), np.sort(order[shared_width:])
    seeds = order[shared_width : shared_width + num_experts]
    cost = rates[rest][:, None] + rates[seeds][None] - 2 * both[np.ix_(rest, seeds)]
    labels = balanced(cost)
    experts = [rest[labels == e] for e in range(num_experts)]
    nearest = [(len(x) * rates[x] - 2 * both[np.ix_(x, x)].sum(1)).argmin() for x in experts]
    found = np.array([x[at] for x, at in zip(experts, nearest, strict=True)])
    return Groups(shared=shared, experts=experts, representatives=found)


init = CMoE
