"""The teacher's largest logits, kept on disk: it reads each row once, and is in memory only meanwhile.

A folder holds `about.json`, which says what the logits depend on, and segments, each written whole. A segment
is named by a hash of its content, and it is an array of records: a hash of what the teacher read, the
logarithms of its largest probabilities, and their words. Rows are found by what is in them. So a run that
draws them in another order, for another epoch or on other ranks finds them too.

Letters: B rows, L tokens of a row, K words with the largest logits.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from upcycle.checkpoints.checkpoint import file_hash, read_json
from upcycle.data.feeding import Feed
from upcycle.errors import UpcycleError, listed
from upcycle.system import claim, progress, whole_file
from upcycle.tasks import Batch, Question
from upcycle.training import together
from upcycle.training.distillation import Largest
from upcycle.training.parallel import Ranks

FORMAT = 1
ABOUT = "about.json"
LOGS, IDS = "teacher_logs", "teacher_ids"  # names in a batch
_SEGMENT = 1 << 26  # bytes of a segment, about
_ATTEMPTS, _PAUSE = 120, 0.5  # how often ranks look for a folder that is the same, and seconds between
_HASH = 16  # bytes of the hash of a row
_LATER = ("config",)  # keys of `about.json` that earlier versions did not write

_LOST = (
    "the teacher's logits of a row are not there: their folder has lost files, or another rank does not see "
    "it; start again with --resume"
)

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class KeptLogits:
    """The logits in a folder, by the hashes of their rows."""

    segments: tuple[np.ndarray, ...]  # records, memory-mapped
    places: Mapping[bytes, tuple[int, int]]  # a segment and a record of it

    def beside(self, batch: Arrays) -> Arrays:
        """Return a batch with what the teacher says: logarithms [B, L, K] and words [B, L, K]."""
        rows = hashes(batch)
        if any(row not in self.places for row in rows):
            raise UpcycleError(_LOST)
        found = [self.segments[s][n] for s, n in map(self.places.__getitem__, rows)]
        ids = np.stack([record["ids"] for record in found]).astype(np.int64)
        return {**batch, LOGS: np.stack([record["logs"] for record in found]), IDS: ids}

    def lesson(self, question: Question, batch: Batch, *, in_chunks: bool) -> Largest:
        """Return what the teacher says about every token of a batch that `beside` made, on the device."""
        return Largest(logs=batch[LOGS].flatten(0, 1), ids=batch[IDS].flatten(0, 1))


@dataclass(frozen=True, kw_only=True)
class Maker:
    """The settings with which logits are made that are not there yet."""

    folder: Path
    about: Mapping[str, Any]
    length: int  # L
    count: int  # K
    vocabulary: int
    ranks: Ranks
    rows: int  # of a forward pass

    @property
    def record(self) -> np.dtype[Any]:
        """The type of a record."""
        shape, words = (self.length, self.count), "<u2" if self.vocabulary <= 1 << 16 else "<u4"
        return np.dtype([("row", f"V{_HASH}"), ("logs", "<f4", shape), ("ids", words, shape)])

    def kept(
        self,
        feed: Feed,
        steps: int,
        rows: int,
        build: Callable[[], PreTrainedModel],
        say: Callable[[PreTrainedModel, Arrays], Largest],
    ) -> KeptLogits:
        """Return the logits of the next `steps` batches of `rows` rows; make those that are not there.

        `build` returns the teacher, and is called only if something has to be made. `say` returns what it
        says about rows. Every rank calls this. Raises `UpcycleError` for a folder of other logits.
        """
        together.by_first(self._claim, self.ranks)
        self._refuse_apart()
        known = set(together.of_first(lambda: [*self._found().places], self.ranks))
        group, model = self.rows * self.ranks.dp_size, None
        most = max(1, _SEGMENT // (self.record.itemsize * self.rows))  # passes whose records are a segment
        waiting: list[Arrays] = []
        made: list[np.ndarray] = []
        begun = feed.state()
        with progress.work("keeping the teacher's logits", "steps", total=steps) as work:
            for number in range(steps):
                batch = feed.next(rows)
                for place, row in enumerate(hashes(batch)):
                    if row not in known:
                        known.add(row)
                        waiting.append({name: array[place : place + 1] for name, array in batch.items()})
                while len(waiting) >= group or (waiting and number + 1 == steps):
                    model = model or build()
                    made.append(self._made(waiting[:group], model, say))
                    del waiting[:group]
                    made = self._written(made, len(made) >= most)
                work.advance(1)
        self._written(made, bool(made))
        feed.restore(begun)
        self._refuse_apart()
        return together.by_each(lambda: self._all_of(known), self.ranks)

    def _claim(self) -> None:
        """Make the folder, or refuse one of other logits."""
        claim.refuse_below_a_file(self.folder)
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise UpcycleError(f"{self.folder} is a file; set teacher.cache to a folder to make")
        path = self.folder / ABOUT
        mine = json.loads(json.dumps({"format": FORMAT, **self.about}))
        if path.is_file():
            theirs = {**{key: mine.get(key) for key in _LATER}, **read_json(path, "")}
            if different := sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k)):
                raise UpcycleError(
                    f"{self.folder} holds logits that were made otherwise (they differ in "
                    f"{listed(different)}); delete it, or set teacher.cache to another folder"
                )
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise UpcycleError(
                f"{self.folder} holds something else than a teacher's logits; set teacher.cache to another "
                f"folder"
            )
        whole_file.write_json(path, mine)

    def _refuse_apart(self) -> None:
        """Refuse a folder that is not the same on all ranks: each would learn from other logits.

        Segments are named by what is in them. A network file system may show a new one late.
        """
        for attempt in range(_ATTEMPTS):
            time.sleep(_PAUSE if attempt else 0)
            told = self.ranks.gathered(self._names())
            if all(names == told[0] for names in told):
                return
        rank = next(rank for rank, names in enumerate(told) if names != told[0])
        raise UpcycleError(
            f"process {rank} of {self.ranks.world} sees other logits in {self.folder} than process 0; "
            f"`teacher.cache`, or else `out`, must lie on a file system that all nodes share"
        )

    def _all_of(self, known: Collection[bytes]) -> KeptLogits:
        """Return the logits that are there; raise `UpcycleError` if those of a known row are not."""
        found = self._found()
        if any(row not in found.places for row in known):
            raise UpcycleError(_LOST)
        return found

    def _names(self) -> list[str]:
        """Return the names of the segments that are there, and what the folder says of them."""
        path = self.folder / ABOUT
        about = path.read_text() if path.is_file() else ""
        return [about, *sorted(each.name for each in self.folder.glob("*.logits"))]

    def _found(self) -> KeptLogits:
        """Return the logits that are there; a segment that is not as it was written is made anew."""
        segments: list[np.ndarray] = []
        places: dict[bytes, tuple[int, int]] = {}
        for path in sorted(self.folder.glob("*.logits")):
            if file_hash(path) != path.stem:
                progress.say(f"{path} is damaged; its logits are made anew")
                continue
            segment = np.memmap(path, self.record, mode="r")
            for number, row in enumerate(segment["row"]):
                places.setdefault(row.tobytes(), (len(segments), number))
            segments.append(segment)
        return KeptLogits(segments=tuple(segments), places=places)

    def _made(
        self, rows: list[Arrays], model: PreTrainedModel, say: Callable[[PreTrainedModel, Arrays], Largest]
    ) -> np.ndarray:
        """Return records of this rank's share of rows; all ranks run the same number of forward passes."""
        share = -(-len(rows) // self.ranks.dp_size)
        mine = rows[self.ranks.dp_rank * share :][:share]
        read = mine or rows[:1]
        batch = {name: np.concatenate([row[name] for row in read]) for name in read[0]}
        said = say(model, batch)
        out = np.empty(len(mine), self.record)
        if mine:
            shape = (len(mine), self.length, self.count)
            out["row"] = np.array([np.void(row) for row in hashes(batch)])
            out["logs"] = said.logs.float().cpu().numpy().reshape(shape)
            out["ids"] = said.ids.cpu().numpy().reshape(shape)
        return out

    def _written(self, made: list[np.ndarray], now: bool) -> list[np.ndarray]:
        """Write records as a segment if it is time, which it is on all ranks or none; return those that wait.

        Raises the same `UpcycleError` on all ranks if one of them cannot write.
        """
        if now:
            together.by_each(lambda: self._write(made), self.ranks)
        return [] if now else made

    def _write(self, made: list[np.ndarray]) -> None:
        place = self.ranks.layout.at(self.ranks.rank)
        raw = np.concatenate(made).tobytes()
        if raw and place.tp == 0:  # ranks that share matrices have the same records
            whole_file.write(self.folder / f"{hashlib.sha256(raw).hexdigest()}.logits", raw)


def hashes(batch: Arrays) -> list[bytes]:
    """Return a hash of everything in each row of a batch."""
    names = sorted(name for name in batch if name not in (LOGS, IDS))
    return [
        hashlib.blake2b(
            b"".join(np.ascontiguousarray(batch[name][row]).tobytes() for name in names), digest_size=_HASH
        ).digest()
        for row in range(len(batch[names[0]]))
    ]


def on(device: torch.device, batch: Arrays) -> Batch:
    """Return a batch on a device."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in batch.items()}
