"""The feed of packed token rows, with a random key for each row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle.data import corpus
from upcycle.data.batches import Batches, Places
from upcycle.data.corpus import Data
from upcycle.data.documents import Source
from upcycle.data.feeding import Feeding
from upcycle.data.splits import unread
from upcycle.data.stamps import Stamp
from upcycle.errors import UpcycleError
from upcycle.tensors import rng

if TYPE_CHECKING:
    from upcycle.dense.subject import Subject

Make = Callable[[np.ndarray, Sequence[rng.Key]], dict[str, np.ndarray]]


def tokenizer_of(feeding: Feeding, subject: Subject) -> Any:
    """Return the tokenizer that the data names, or the model's own."""
    return corpus.tokenizer(feeding.data, subject.folder)


def objection_to_sources(data: Data) -> str | None:
    """Return a sentence about sources of text that would not be read as they say; or None."""
    return next(filter(None, map(unread, data.sources)), None)


def refuse_idle(texts: Iterable[str | Path], **given: str | None) -> None:
    """Raise `UpcycleError` for a key of a source, such as `field`, that none of the texts could have."""
    if all(value == getattr(Source, key) for key, value in given.items()):
        return
    sources = [Source(path=str(path), **given) for path in texts]  # type: ignore[arg-type]
    idle = [unread(source, "--{}") for source in sources]
    if idle and None not in idle:
        raise UpcycleError(str(idle[0]))


def refuse_sound(subject: Subject) -> None:
    """Raise `UpcycleError` for a model that reads sound, because all data are texts or images."""
    if "image_size" not in subject.settings and not subject.reads_text:
        raise UpcycleError(
            f"{subject.architecture} reads sound and no text, and upcycle shows a model texts and images "
            f"alone; take another checkpoint"
        )


class TokenFeed:
    """Feeds `make(rows [N, L + 1], keys)`. The last token of a row is the first of the next.

    With `data.isolate`, also `positions` [N, L + 1], which start anew at each document (`Batches.positions`).
    """

    def __init__(self, feeding: Feeding, subject: Subject, make: Make) -> None:
        data, seed = feeding.data, feeding.seed
        self._tokens = corpus.prepare(
            data, subject.folder, feeding.cache, vocab_size=subject.vocab_size, checked=feeding.checked
        )
        weights = [source.weight for source in data.sources]
        self._batches = Batches(
            self._tokens,
            weights,
            length=feeding.length,
            held_out=data.held_out,
            seed=seed,
            readings=feeding.readings,
            setting=feeding.setting,
        )
        self._make, self._seed, self._isolate = make, seed, data.isolate

    @property
    def trainable(self) -> list[int]:
        """The number of training rows of each source."""
        return self._batches.trainable

    def next(self, rows: int, part: slice = slice(None)) -> dict[str, np.ndarray]:
        first = self._batches.position
        keys = [rng.key(self._seed, "drawn", first + i) for i in range(rows)]
        return self._made(self._batches.draw(rows, part), keys[part])

    def at(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """Return rows number `places` [B] of the first source; random draws depend on the row's number."""
        keys = [rng.key(self._seed, "drawn", "at", int(place)) for place in places]
        return self._made([(0, place) for place in places.tolist()], keys)

    def held_out(self, rows: int | None = None) -> dict[str, np.ndarray]:
        places = self._batches.kept(rows)
        return self._made(places, [rng.key(self._seed, "drawn", "held out", i) for i in range(len(places))])

    def _made(self, places: Places, keys: Sequence[rng.Key]) -> dict[str, np.ndarray]:
        made = self._make(self._batches.ids(places), keys)
        return made | {"positions": self._batches.positions(places)} if self._isolate else made

    def state(self) -> dict[str, Any]:
        return self._batches.state()

    def known(self) -> list[tuple[str, Any]]:
        return [
            (each.name, [each.count, each.sha256, each.starts_sha256 if self._isolate else None])
            for each in self._tokens
        ]

    def checked(self) -> dict[str, Stamp]:
        return corpus.stamps_of(self._tokens)

    def restore(self, state: dict[str, Any]) -> None:
        self._batches.restore(state)
