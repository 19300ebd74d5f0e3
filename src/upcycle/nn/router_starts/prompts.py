"""Means of what the router reads for the prompts or the text of each expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from upcycle.nn.router_starts._measured import OfDomains, unit
from upcycle.records.statistics import NEGATIVE

if TYPE_CHECKING:
    from upcycle.init import Site


@dataclass(frozen=True, kw_only=True)
class Prompts(OfDomains):
    """The mean input of the network over the tokens of each expert's prompts, less the mean over all experts.

    The mean over the negative prompts, if there are any, is taken off first. What all experts have in common
    does not change a softmax, and it would drown what tells them apart. mergekit-moe's `hidden` leaves it in,
    and reads the residual stream instead of the input of the network.
    """

    summary = "means of the network's input over each expert's prompts or text, less what all have in common"
    collect = "mean"
    texts = "--prompts PROMPTS.toml"

    def rows(self, site: Site, rows: int) -> np.ndarray:
        found = self.measured.of("channels", site.stack, site.layer, "mean").astype(np.float64)
        length = np.linalg.norm(found, axis=1).max()
        negative = np.array([d.negative_tokens[site.stack] > 0 for d in self.measured.domains])
        if negative.any():
            found = found - self.measured.of("channels", site.stack, site.layer, NEGATIVE)
        chosen = found[self.places(rows)]
        return unit(chosen - chosen.mean(0), length)


start = Prompts
