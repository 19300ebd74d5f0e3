"""Sums of the embeddings of prompts, the same row in all layers (mergekit-moe's gate_mode cheap_embed)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from upcycle.nn.router_starts._measured import OfDomains

if TYPE_CHECKING:
    from upcycle.init import Site


@dataclass(frozen=True, kw_only=True)
class CheapEmbed(OfDomains):
    """The sum of the embeddings of all tokens of an expert's prompts, less that of its negative prompts."""

    summary = "mergekit-moe's gate_mode cheap_embed: sums of the embeddings of prompts"
    collect = "cheap_embed"
    texts = "--prompts PROMPTS.toml"

    def rows(self, site: Site, rows: int) -> np.ndarray:
        return self.measured.of("embedding", site.stack, 0, "cheap_embed")[self.places(rows)]


start = CheapEmbed
