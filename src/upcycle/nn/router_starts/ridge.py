"""The closed form that tells the domains of texts apart best in the least-squares sense (DUME)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np

from upcycle.nn.router_starts._measured import OfDomains, unit
from upcycle.settings import Above

if TYPE_CHECKING:
    from upcycle.init import Site


@dataclass(frozen=True, kw_only=True)
class Ridge(OfDomains):
    """W = (A + lambda I)^-1 B with A = sum x x^T and B = sum x y^T, y the one-hot domain of a token (DUME).

    x is the input of the network. DUME puts a 1 behind it for a bias, which routers do not have. Leaving the
    bias out afterwards was measured to lose most of the accuracy, so it is left out of the fit. DUME divides
    the logits of rows of length one by 0.1 and takes one expert.
    """

    summary = "least squares from the network's input to the domain of its text, in closed form (DUME)"
    collect = "mean,second_moment"
    texts = "--domain NAME=TEXT"

    temperature: Annotated[float, Above(0)] = 0.1  # what the rows, of length one, are divided by (DUME: 0.1)
    ridge: Annotated[float, Above(0)] = 0.01  # lambda, added to the diagonal of the sum A (DUME: 0.01)

    def rows(self, site: Site, rows: int) -> np.ndarray:
        measured = self.measured
        tokens = np.array([domain.tokens[site.stack] for domain in measured.domains], np.float64)
        means = measured.of("channels", site.stack, site.layer, "mean").astype(np.float64)
        moment = measured.of("channels", site.stack, site.layer, "second_moment") * tokens.sum()
        solved = np.linalg.solve(moment + self.ridge * np.eye(len(moment)), (means * tokens[:, None]).T)
        return unit(solved.T[self.places(rows)])


start = Ridge
