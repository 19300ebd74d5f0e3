"""Batches of images in an order that depends on the seed alone: resumed exactly, the same on any ranks.

An epoch is a permutation of the images that are trained on, keyed by (seed, epoch).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from upcycle import rng
from upcycle.errors import UpcycleError, listed
from upcycle.training.images import ImageSet


class ImageBatches:
    """The images of a set, and a position among them.

    Without a set to hold out, `held_out_share` of the images are: the last ones of a permutation, so that
    their classes are mixed; with one, the share means nothing. Raises `UpcycleError` where that leaves none
    on either side, or the sets differ in kind.
    """

    def __init__(
        self, train: ImageSet, held_out: ImageSet | None, *, held_out_share: float, seed: int
    ) -> None:
        self._train, self._seed, self._consumed = train, seed, 0
        self._digest = hashlib.sha256(train.labels.astype("<i8").tobytes()).hexdigest()[:16]
        share = held_out_share if held_out is None else 0.0
        kept = len(train) - round(len(train) * share)
        if not kept or (share and kept == len(train)):
            raise UpcycleError(
                f"{train.name} has {len(train)} images, of which data.held_out = {share} leaves none "
                f"{'held out' if kept else 'to train on'}; change it, or give more images"
            )
        order = rng.permutation(rng.key(seed, "held-out images"), len(train))
        self._trained = np.sort(order[:kept]) if share else np.arange(len(train))
        self._kept_set = train if held_out is None else held_out
        self._kept = np.sort(order[kept:]) if held_out is None else np.arange(len(held_out))
        if held_out is not None:
            _same_kind(train, held_out)

    @property
    def trainable(self) -> list[int]:
        """Images that are trained on."""
        return [len(self._trained)]

    @property
    def epochs(self) -> list[float]:
        """How often the images have been gone through."""
        return [self._consumed / len(self._trained)]

    def state(self) -> dict[str, Any]:
        """The position, as JSON has it."""
        return {"consumed": self._consumed, "images": len(self._train), "labels": self._digest}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position. Raises `UpcycleError` where the images have changed since."""
        if (count := len(self._train)) != state["images"] or self._digest != state["labels"]:
            other = count != state["images"]
            what = (
                f"has {count} images and had {state['images']}" if other else "has other labels than it had"
            )
            raise UpcycleError(
                f"{self._train.name} {what} when the checkpoint was saved; put the data back as it was, or "
                f"start a new run"
            )
        self._consumed = int(state["consumed"])

    def next(self, rows: int, part: slice = slice(None)) -> dict[str, np.ndarray]:
        """The next `rows` images, of which those of `part` are read: pixels [N, H, W, C], labels [N]."""
        chosen, wanted = [], rows
        while wanted:
            epoch, place = divmod(self._consumed, len(self._trained))
            order = rng.permutation(rng.key(self._seed, "images", epoch), len(self._trained))
            chosen.append(order[place : place + wanted])
            self._consumed += len(chosen[-1])
            wanted -= len(chosen[-1])
        places = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
        return _read(self._train, self._trained[places[part]])

    def held_out(self, rows: int | None = None) -> dict[str, np.ndarray]:
        """Held-out images, always the same: all, or at most `rows`, evenly spaced over them."""
        n = len(self._kept)
        taken = n if rows is None else min(n, rows)
        places = np.arange(taken) * n // max(taken, 1)
        return _read(self._kept_set, self._kept[places])


def _read(images: ImageSet, indices: np.ndarray) -> dict[str, np.ndarray]:
    return {"pixels": images.read(indices), "labels": images.labels[indices]}


def _same_kind(train: ImageSet, held_out: ImageSet) -> None:
    a, b = ((*s.size, s.channels) for s in (train, held_out))
    if a != b:
        raise UpcycleError(
            f"{train.name} is of images {a} and {held_out.name} of images {b}; open both with one size"
        )
    if train.class_names and held_out.class_names and train.class_names != held_out.class_names:
        here, there = set(train.class_names), set(held_out.class_names)
        differs = sorted(here ^ there)
        what = f"only one of them has {listed(differs)}" if differs else "their order differs"
        raise UpcycleError(
            f"{train.name} and {held_out.name} name other classes: {what}; give two parts of one data set"
        )
    if held_out.num_labels > train.num_labels:
        raise UpcycleError(
            f"{held_out.name} has labels up to {held_out.num_labels - 1} and {train.name} up to "
            f"{train.num_labels - 1}; give two parts of one data set"
        )
