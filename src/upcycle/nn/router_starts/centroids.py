"""Centroids of the network's input (spherical k-means), without domains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np

from upcycle.errors import UpcycleError
from upcycle.nn.router_starts._measured import Measured, unit
from upcycle.settings import AtLeast
from upcycle.tensors import rng

if TYPE_CHECKING:
    from upcycle.init import Site


@dataclass(frozen=True, kw_only=True)
class Centroids(Measured):
    """The centroids of E clusters of the tokens of a sample, by cosine (cluster-aware upcycling).

    The tokens are centred before, because what all tokens have in common would make all centroids alike.
    """

    summary = "spherical k-means of a sample of the network's input, a cluster for each expert"
    collect = "sample"
    texts = "--text TEXT"

    rounds: Annotated[int, AtLeast(1)] = 50  # the most rounds of k-means

    def refuse(self, site: Site, rows: int) -> None:
        info = self.measured.tensors.get(f"channels.{site.stack}.{site.layer}.sample")
        if info is not None and info.shape[0] < rows:
            raise UpcycleError(
                f"{self.measured.path} has a sample of {info.shape[0]} tokens and a layer {rows} experts; "
                f"calibrate on more, with --sample {rows} or more"
            )

    def drawn(self, site: Site) -> list[object]:
        return list(site.key("router"))

    def rows(self, site: Site, rows: int) -> np.ndarray:
        sample = self.measured.of("channels", site.stack, site.layer, "sample").astype(np.float64)
        return spherical_kmeans(sample - sample.mean(0), rows, site.key("router"), self.rounds)


def spherical_kmeans(tokens: np.ndarray, k: int, key: rng.Key, rounds: int) -> np.ndarray:
    """Return `k` unit centroids [k, H] of `tokens` [S, H] by cosine.

    The first centroids are tokens far from one another. A cluster that loses its last token keeps its
    centroid.
    """
    directions = unit(tokens)
    centroids = directions[_spread_out(directions, k, key)]
    labels = np.full(len(tokens), -1)
    for _ in range(rounds):
        # Rounded, so that the last bit of a product on another machine hardly ever moves a token.
        new = (directions @ centroids.T).round(9).argmax(1)
        if (new == labels).all():
            break
        labels = new
        sums = np.zeros_like(centroids)
        np.add.at(sums, labels, directions)
        there = np.bincount(labels, minlength=k) > 0
        centroids = np.where(there[:, None], unit(sums), centroids)
    return centroids


def _spread_out(directions: np.ndarray, k: int, key: rng.Key) -> list[int]:
    """Return k tokens: the one that the key draws, then always the one least like those before."""
    chosen = [int(rng.permutation(key, len(directions))[0])]
    closest = (directions @ directions[chosen[0]]).round(9)
    while len(chosen) < k:
        chosen.append(int(closest.argmin()))
        closest = np.maximum(closest, (directions @ directions[chosen[-1]]).round(9))
    return chosen


start = Centroids
