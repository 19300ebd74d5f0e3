"""The rows of a router's weight, seen as directions: how alike they are, and which are never the largest.

Nothing here imports torch. Letters: E experts, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from upcycle.errors import listed
from upcycle.system.wording import layers_of

ALIKE = 0.99  # cosine above which two rows are called alike
_DEPENDENT = 1e-6  # singular values below this share of the largest count as zero
_INSIDE = 1e-5  # distance below which a row lies between others, relative to the longest row


@dataclass(frozen=True, kw_only=True)
class RouterRows:
    """The similarities of the rows of one router.

    `condition` is the largest over the smallest singular value of the weight, as mergekit-moe has it; None
    if the smallest is zero. `spread` is that of the rows without what they have in common, which no softmax
    sees. `never_first` are the experts whose logit is never the largest, whatever the token: their row lies
    between those of others. Rows that are equal tie, and are no such case.
    """

    cosine: np.ndarray  # [E, E]
    condition: float | None
    spread: float | None
    never_first: tuple[int, ...]

    @property
    def alike(self) -> list[tuple[int, int, float]]:
        """The pairs of experts whose rows have a cosine above `ALIKE`, and that cosine."""
        pairs = zip(*np.triu_indices(len(self.cosine), 1), strict=True)
        found = ((int(a), int(b), float(self.cosine[a, b])) for a, b in pairs)
        return [pair for pair in found if pair[2] > ALIKE]

    @property
    def zero(self) -> list[int]:
        """The experts whose rows are zero. Such a row has no cosine, not even with itself."""
        return np.flatnonzero(self.cosine.diagonal() == 0).tolist()

    @property
    def between(self) -> dict[str, float] | None:
        """The mean, least and largest cosine of pairs of different experts; None for one expert."""
        values = self.cosine[np.triu_indices(len(self.cosine), 1)]
        if not values.size:
            return None
        return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> RouterRows:
        """Return what `as_dict` made a table of."""
        return cls(
            cosine=np.array(table["cosine"]),
            condition=table["condition"],
            spread=table["spread"],
            never_first=tuple(table["never_first"]),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "cosine": self.cosine.round(6).tolist(),
            "condition": self.condition,
            "spread": self.spread,
            "never_first": list(self.never_first),
        }


def seen(weight: np.ndarray) -> RouterRows:
    """Return how the rows of `weight` [E, H] lie to one another; all NaN if the weight is not finite."""
    rows = weight.astype(np.float64)
    if not np.isfinite(rows).all():
        unknown = np.full((len(rows), len(rows)), math.nan)
        return RouterRows(cosine=unknown, condition=math.nan, spread=math.nan, never_first=())
    lengths = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    unit = rows / lengths
    centred = rows - rows.mean(0)
    values = np.linalg.svd(centred, compute_uv=False)[: len(rows) - 1]
    dependent = len(rows) > len(rows[0]) + 1 or bool((values <= _DEPENDENT * max(values, default=1)).any())
    return RouterRows(
        cosine=(unit @ unit.T).clip(-1, 1),
        condition=_ratio(np.linalg.svd(rows, compute_uv=False)),
        spread=_ratio(values),
        never_first=tuple(e for e in range(len(rows)) if dependent and _inside(rows, e)),
    )


def _ratio(values: np.ndarray) -> float | None:
    """Return the largest singular value over the smallest; None if that is zero or there is none."""
    if not values.size or values[-1] <= 1e-12 * values[0]:
        return None
    ratio = float(values[0] / values[-1])
    return float(f"{ratio:.6g}") if math.isfinite(ratio) else None


def _inside(rows: np.ndarray, e: int) -> bool:
    """Return whether row `e` lies in the convex hull of the others.

    The logit of expert e is then a mean of others' for every token, and never above all of them. The point
    of the hull nearest to the row is found by Wolfe's algorithm (1976).
    """
    limit = (_INSIDE**2) * max(float(np.square(rows).sum(1).max()), 1e-300)
    others = rows - rows[e]
    others = others[np.square(others).sum(1) > limit]  # without the row itself and its equals
    if not len(others):
        return False
    gram = others @ others.T
    chosen = [int(np.diag(gram).argmin())]
    weights = np.ones(1)
    for _ in range(8 * len(others)):
        products = gram[:, chosen] @ weights
        squared = float(weights @ products[chosen])
        if squared <= limit:
            return True
        new = int(products.argmin())
        if products[new] >= squared * (1 - 1e-9) or new in chosen:
            return False
        chosen, weights = [*chosen, new], np.append(weights, 0.0)
        chosen, weights = _nearest(gram, chosen, weights)
    return False


def _nearest(gram: np.ndarray, chosen: list[int], weights: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Return the points and weights of the point of their hull that is nearest to the origin."""
    while True:
        count = len(chosen)
        system = np.zeros((count + 1, count + 1))
        system[:count, :count] = gram[np.ix_(chosen, chosen)]
        system[:count, count] = system[count, :count] = 1
        best = np.linalg.lstsq(system, np.append(np.zeros(count), 1.0), rcond=None)[0][:count]
        if (best > 1e-12).all():
            return chosen, best
        falling = best <= 1e-12
        step = float((weights[falling] / np.maximum(weights[falling] - best[falling], 1e-300)).min())
        weights = weights + min(1.0, step) * (best - weights)
        kept = weights > 1e-12
        if kept.all():  # rounding: take the smallest out
            kept[int(weights.argmin())] = False
        chosen = [each for each, stays in zip(chosen, kept, strict=True) if stays]
        weights = weights[kept] / weights[kept].sum()


def warnings(found: Mapping[str, RouterRows]) -> list[str]:
    """Return a sentence for each expert whose logit never wins, rows of zeros, and each pair of rows alike.

    `found` has the routers by the name of their place. Places that have the same to say share a sentence.
    """
    said: dict[str, list[str]] = {}
    for place, rows in found.items():
        if len(rows.zero) > 1:
            said.setdefault(
                f"experts {listed([*map(str, rows.zero)])} have rows of zeros in the router, so "
                f"that every token scores them alike",
                [],
            ).append(place)
        for e in rows.never_first:
            said.setdefault(
                f"expert {e} has the largest logit for no token, because its row of the router lies between "
                f"those of others",
                [],
            ).append(place)
        for a, b, _ in rows.alike:
            said.setdefault(
                f"experts {a} and {b} have rows of the router with a cosine above {ALIKE}, so that nearly "
                f"the same tokens score high with both",
                [],
            ).append(place)
    return [f"{sentence} ({layers_of(places)})" for sentence, places in said.items()]
