"""Labelled examples in an order that depends on seeds alone: it resumes exactly, on any number of ranks.

An epoch is a permutation of the training examples, keyed by (seed, epoch).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from upcycle.data.class_labels import NamesOfNumbers
from upcycle.data.folders import put_back
from upcycle.data.readings import Reading
from upcycle.data.stamps import Stamp
from upcycle.errors import UpcycleError, listed
from upcycle.tensors import rng

_DAMAGED = "what the checkpoint says of its place in the data is damaged; delete its folder"


class Labelled(Protocol):
    """The interface of a set of labelled examples."""

    @property
    def name(self) -> str:
        """The source of the set."""

    @property
    def kind(self) -> str:
        """The noun for its examples, in the plural."""

    @property
    def labels(self) -> np.ndarray:
        """The labels, int64 [N]."""

    @property
    def num_labels(self) -> int:
        """The number of classes."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; empty if the data has none."""

    @property
    def digest(self) -> str | None:
        """A hash of the content; None if it is not known."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples numbered `indices`, with the names that the task uses."""

    def refuse(self, held_out: Any) -> None:
        """Raise `UpcycleError` if `held_out` does not fit this training set."""


class Examples:
    """The examples of a set, with a position that can be saved.

    If `held_out` is None, the share `held_out_share` of the examples is held out: the last ones of a
    permutation, so that their classes are mixed. The permutation depends on `split_seed` alone, so that runs
    of several seeds hold out the same. With a `held_out` set, the share is ignored. The set is read on from
    `reading`, which other feeds may share; by default, from its first examples. Raises `UpcycleError` if
    either side would be empty, or if the sets do not fit each other.
    """

    def __init__(
        self,
        train: Labelled,
        held_out: Labelled | None,
        *,
        held_out_share: float,
        seed: int,
        split_seed: int = 0,
        reading: Reading | None = None,
    ) -> None:
        self._train, self._seed, self._reading = train, seed, reading or Reading()
        share = held_out_share if held_out is None else 0.0
        kept = len(train) - round(len(train) * share)
        if not kept or (share and kept == len(train)):
            raise UpcycleError(
                f"{train.name} has {len(train)} {train.kind}, of which data.held_out = {share} leaves none "
                f"{'held out' if kept else 'to train on'}; change it, or give more {train.kind}"
            )
        order = rng.permutation(rng.key(split_seed, "held-out examples"), len(train))
        self._trained = np.sort(order[:kept]) if share else np.arange(len(train))
        self._kept_set = train if held_out is None else held_out
        self._kept = np.sort(order[kept:]) if held_out is None else np.arange(len(held_out))
        if held_out is not None:
            train.refuse(held_out)
        # A run asks for its state after every step, and hashes take time.
        self._known = _known(train)
        self._test = None if held_out is None else _known(held_out)

    @property
    def examples(self) -> Labelled:
        """The set, with the examples that are held out of it."""
        return self._train

    @property
    def trainable(self) -> list[int]:
        """The number of training examples, in a list of one."""
        return [len(self._trained)]

    @property
    def epochs(self) -> list[float]:
        """The number of passes over the examples, in a list of one."""
        return [self._reading.consumed / len(self._trained)]

    def state(self) -> dict[str, Any]:
        """Return the position, and what the sets are, as JSON."""
        apart = {} if self._test is None else {"test": self._test}
        return {"consumed": self._reading.consumed, **self._known, **apart}

    def known(self) -> list[tuple[str, Any]]:
        """Return the name of the set, and of one to score on, and by what each is known again, as JSON."""
        test = [] if self._test is None else [(self._kept_set.name, self._test)]
        return [(self._train.name, self._known), *test]

    def checked(self) -> dict[str, Stamp]:
        """Return no stamps: every process reads examples, or compares prepared ones, by itself."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises `UpcycleError` if the examples have changed since.

        Checkpoints of versions that recorded no test set are accepted.
        """
        consumed, test = state.get("consumed"), state.get("test")
        if type(consumed) is not int or consumed < 0 or not isinstance(test, dict | None):
            raise UpcycleError(_DAMAGED)
        _refuse_changed(self._train, self._known, state)
        if test is not None and self._test is not None:
            _refuse_changed(self._kept_set, self._test, test)
        self._reading.consumed = consumed

    def next(self, rows: int, part: slice = slice(None)) -> dict[str, np.ndarray]:
        """Advance by `rows` examples and return those in `part`."""
        chosen, wanted = [], rows
        while wanted:
            epoch, place = divmod(self._reading.consumed, len(self._trained))
            order = self._reading.order(rng.key(self._seed, "examples", epoch), len(self._trained))
            chosen.append(order[place : place + wanted])
            self._reading.consumed += len(chosen[-1])
            wanted -= len(chosen[-1])
        places = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
        return self._train.rows(self._trained[places[part]])

    def at(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """Return the training examples numbered `places` [B]: arrays [B, ...] by name."""
        return self._train.rows(self._trained[places])

    def held_out(self, rows: int | None = None) -> dict[str, np.ndarray]:
        """Return held-out examples, always the same ones: all, or at most `rows`, evenly spaced."""
        n = len(self._kept)
        taken = n if rows is None else min(n, rows)
        places = np.arange(taken) * n // max(taken, 1)
        return self._kept_set.rows(self._kept[places])


def _known(examples: Labelled) -> dict[str, Any]:
    """Return by what a set is known again, as JSON."""
    labels = hashlib.sha256(examples.labels.astype("<i8").tobytes()).hexdigest()[:16]
    content = {} if examples.digest is None else {"sha256": examples.digest}
    return {"examples": len(examples), "labels": labels, **content}


def _refuse_changed(examples: Labelled, now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Raise `UpcycleError` if a set, which is known by `now`, is not the one that a checkpoint says."""
    name, heeded, before = examples.name, "", then.get("examples")
    if type(before) is not int:
        raise UpcycleError(_DAMAGED)
    if now["examples"] != before:
        raise UpcycleError(
            f"{name} has {now['examples']} {examples.kind} and had {before} when the checkpoint was saved; "
            f"{put_back(name)}, or start a new run"
        )
    if now["labels"] != then.get("labels"):
        if isinstance(examples.class_names, NamesOfNumbers):
            heeded = " (if its numbers counted then, and not their names, store them without names)"
        raise UpcycleError(
            f"{name} has other labels than it had when the checkpoint was saved; put the data back as it "
            f"was{heeded}, or start a new run"
        )
    if None not in (both := (now.get("sha256"), then.get("sha256"))) and both[0] != both[1]:
        if examples.kind == "images":
            heeded = (
                " (if the run began in an earlier version, which read less of preprocessor_config.json, go "
                "on with that one)"
            )
        raise UpcycleError(
            f"{name} has other {examples.kind} than it had when the checkpoint was saved; put the data back "
            f"as it was{heeded}, or start a new run"
        )


def refuse_other_classes(train: Labelled, held_out: Labelled) -> None:
    """Raise `UpcycleError` if the classes of the held-out set are not those of the training set."""
    if train.class_names and held_out.class_names and train.class_names != held_out.class_names:
        here, there = set(train.class_names), set(held_out.class_names)
        differs = sorted(here ^ there)
        what = f"only one of them has {listed(differs)}" if differs else "their order differs"
        raise UpcycleError(
            f"{train.name} and {held_out.name} name other classes: {what}; give two parts of one data "
            f"set, or in a run, set task.classes to the names of all classes"
        )
    if held_out.num_labels > train.num_labels:
        raise UpcycleError(
            f"{held_out.name} has labels up to {held_out.num_labels - 1} and {train.name} up to "
            f"{train.num_labels - 1}; give two parts of one data set"
        )
