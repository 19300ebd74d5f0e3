"""The rows of mergekit-moe's gate_mode hidden, for people who compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from upcycle.nn.router_starts._measured import OfDomains

if TYPE_CHECKING:
    from upcycle.init import Site


@dataclass(frozen=True, kw_only=True)
class MergekitHidden(OfDomains):
    """The residual stream that enters a block, at the last token of each expert's prompts (mergekit-moe).

    `calibrate` works the rows out in bfloat16, as mergekit does, and they are kept to the bit if the
    temperature is 1. A router reads another vector: the normalised stream behind attention. `prompts` takes
    the means of that one.
    """

    summary = "mergekit-moe's gate_mode hidden: the residual stream at the last token of prompts"
    texts = "--prompts PROMPTS.toml"

    average: bool = False  # sum over all positions, padding included, as gate_mode hidden_avg does

    @property
    def collect(self) -> str:
        return "mergekit_hidden_avg" if self.average else "mergekit_hidden"

    def rows(self, site: Site, rows: int) -> np.ndarray:
        return self.measured.of("residual", site.stack, site.layer, self.collect)[self.places(rows)]


start = MergekitHidden
