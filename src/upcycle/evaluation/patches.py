"""The image patches that the router sends to each expert with the highest probability."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from upcycle.families import Grid

FAVOURITES = 8  # how many tokens or patches are shown for each expert


@dataclass(kw_only=True)
class Patches:
    """The n patches with the highest probability for each of E experts, best first."""

    weights: np.ndarray  # [E, n], probabilities
    pixels: np.ndarray  # [E, n, C, height, width], as given to the model

    @classmethod
    def none(cls) -> Patches:
        """Return an empty collection."""
        return cls(weights=np.zeros((0, 0)), pixels=np.zeros((0, 0)))

    def add(self, images: np.ndarray, probabilities: np.ndarray, grid: Grid) -> None:
        """Add images [B, C, H, W] whose tokens have `probabilities` [B, N, E].

        The last of the N tokens are the patches, row by row.
        """
        count, tokens, experts = probabilities.shape
        channels, cells = images.shape[1], grid.rows * grid.columns
        whole = images[:, :, : grid.rows * grid.height, : grid.columns * grid.width]
        cut = whole.reshape(count, channels, grid.rows, grid.height, grid.columns, grid.width)
        cut = cut.transpose(0, 2, 4, 1, 3, 5).reshape(count * cells, channels, grid.height, grid.width)
        found = probabilities[:, tokens - cells :].reshape(-1, experts).T  # [E, B cells]
        best = np.argsort(-found, axis=1, kind="stable")[:, :FAVOURITES]
        weights, pixels = np.take_along_axis(found, best, 1), cut[best]
        if self.weights.size:
            weights = np.concatenate([self.weights, weights], 1)
            pixels = np.concatenate([self.pixels, pixels], 1)
        order = np.argsort(-weights, axis=1, kind="stable")[:, :FAVOURITES]
        self.weights = np.take_along_axis(weights, order, 1)
        self.pixels = np.take_along_axis(pixels, order[..., None, None, None], 1)
