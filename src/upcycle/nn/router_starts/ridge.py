"""The closed form that tells the domains of texts apart best in the least-squares sense (DUME)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np

from upcycle.nn.router_starts._measured import OfDomains, unit
from upcycle.settings import Above

if TYPE_CHECKING:
    from upcycle.init import Site


@dataclass(frozen=True, kw_only=True)
class Ridge(OfDomains):
    """W = (A + lambda I)^-1 B with A = sum x x^T and B = sum x y^T, y the one-hot domain of a token (DUME).

    x is the input of the network with a 1 behind it. The row of that 1, a bias, is worked out with the others
    and left out of the weight, because routers have none. DUME divides the logits of rows of length one by
    0.1 and takes one expert.
    """

    summary = "least squares from the network's input to the domain of its text, in closed form (DUME)"
    collect: ClassVar[str] = "mean,second_moment --domain NAME=TEXT"

    temperature: Annotated[float, Above(0)] = 0.1  # what the rows, of length one, are divided by (DUME: 0.1)
    ridge: Annotated[float, Above(0)] = 0.01  # lambda, added to the diagonal of the sum A (DUME: 0.01)

    def rows(self, site: Site, rows: int) -> np.ndarray:
        measured = self.measured
        tokens = np.array([domain.tokens[site.stack] for domain in measured.domains], np.float64)
        means = measured.of("channels", site.stack, site.layer, "mean").astype(np.float64)
        moment = measured.of("channels", site.stack, site.layer, "second_moment") * tokens.sum()
        sums = np.concatenate([means * tokens[:, None], tokens[:, None]], axis=1)  # [D, H + 1]
        total = sums.sum(0)
        whole = np.block([[moment, total[:-1, None]], [total[None]]])  # [H + 1, H + 1]
        solved = np.linalg.solve(whole + self.ridge * np.eye(len(whole)), sums.T)
        return unit(solved.T[self.places(rows), :-1])


start = Ridge
