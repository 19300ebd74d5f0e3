"""The hashes of the files that a conversion reads, which must not change until it is done."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from upcycle.blueprints.blueprint import Blueprint
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.conversion.journal import Journal
from upcycle.errors import UpcycleError


def sources(built: Blueprint) -> dict[str, tuple[Checkpoint, Path]]:
    """Return every file that tensors come from, by its name in the journal."""
    return {f"{c.label}/{f.name}": (c, f) for c in built.checkpoints for f in c.files}


class SourceHashes:
    """The hashes of the source files.

    They are computed while tensors are written, kept in the journal, and compared at the end. A file that has
    not been touched since its header was read still has the content that was read, and is not read again. One
    that was touched is hashed once more, at the end or when a run is resumed. It is refused if the run had no
    hash of it yet.
    """

    def __init__(self, built: Blueprint, journal: Journal, stop: threading.Event) -> None:
        self._sources, self._journal, self._stop = sources(built), journal, stop
        self._known: dict[str, str] = journal.notes.get("sha256", {})
        stamps = {key: list(c.stamps[file]) for key, (c, file) in self._sources.items()}
        before = journal.notes.get("stamps", {} if journal.done else stamps)
        for key in [key for key in stamps if stamps[key] != before.get(key)]:
            checkpoint, file = self._sources[key]
            if key not in self._known:
                raise UpcycleError(
                    f"{file} has changed since {journal.folder} was begun, or was only touched: it had not "
                    f"been hashed by then, so nobody can say which; delete that folder and convert again"
                )
            if checkpoint.hash_read(file, stop) != self._known[key]:
                raise UpcycleError(
                    f"{file} has changed since {journal.folder} was begun; put back what it was, or delete "
                    f"that folder and convert again"
                )
        if journal.notes.get("stamps") != stamps:
            journal.record({}, stamps=stamps)

    def take(self) -> dict[str, str]:
        """Compute the hashes by name in the journal, and store them there."""
        if not self._known:
            with ThreadPoolExecutor(2) as pool:
                taken = [pool.submit(c.hash_read, file, self._stop) for c, file in self._sources.values()]
                known = {key: one.result() for key, one in zip(self._sources, taken, strict=True)}
            if not self._stop.is_set():
                self._journal.record({}, sha256=known)
                self._known = known
        return self._known

    def at_the_end(self) -> dict[str, dict[str, str]]:
        """Check that the files still hold what was read; return the hashes by checkpoint and file name."""
        hashes: dict[str, dict[str, str]] = {}
        for key, (checkpoint, file) in self._sources.items():
            checkpoint.refuse_changed(file, self._known[key])
            hashes.setdefault(checkpoint.label, {})[file.name] = self._known[key]
        return hashes
