"""How often a token's scores are so small that what a class adds to their sum shows in its output."""

from __future__ import annotations

import math

from upcycle.init import Site
from upcycle.nn.routers import Router

SHOWS = 1e-5  # relative; a smaller difference to the dense function is taken for rounding
RARELY = 1e-6  # the share of tokens that may differ by more in a layer although the function is promised


def are_rare(site: Site, router: Router, added: float) -> bool:
    """Return whether hardly a token has sigmoids so small that `added` to their sum shows.

    A token of unit variance has products with the rows of a drawn router that vary by std x sqrt(H). What a
    router that starts from data gives is not known before it has run.
    """
    if site.uniform_router:
        return True
    if router.start.from_data:
        return False
    small = added / SHOWS
    least = math.log(1 / small - 1)  # a product below its negative has a score below `small`
    below = math.erfc(least / (router.std * math.sqrt(2 * site.hidden))) / 2
    drawn = site.num_experts // (site.granularity if router.start.groups else 1)
    return below**drawn < RARELY
