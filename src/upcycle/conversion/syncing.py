"""Flushes written tensors to disk in a thread of its own, and then notes them in the journal."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from upcycle.blueprints.shards import Shards
from upcycle.conversion.journal import Journal
from upcycle.conversion.shard_files import ShardFiles


class Syncing:
    """Tensors that are written and not yet flushed, by name with their CRC-32."""

    def __init__(self, files: ShardFiles, shards: Shards, journal: Journal) -> None:
        self._files, self._shards, self._journal = files, shards, journal
        self._written: dict[str, int] = {}
        self._thread = ThreadPoolExecutor(1)
        self._flushes: list[Future[Any]] = []

    def add(self, finished: Iterable[Future[dict[str, int]]], *, at_least: int) -> None:
        """Take in tensors that were written; begin to flush if `at_least` so many bytes wait for it.

        Raises what writing or an earlier flush has raised, such as a full disk.
        """
        for future in finished:
            self._written.update(future.result())
        if sum(self._shards.places[name].nbytes for name in self._written) >= at_least:
            self._flushes.append(self._thread.submit(self._flush, self._written.copy()))
            self._written.clear()
        for earlier in self._flushes:
            if earlier.done():
                earlier.result()

    def wait(self) -> None:
        """Return when everything that was begun is on disk."""
        for flush in self._flushes:
            flush.result()

    def close(self) -> None:
        """Give up what has not begun, and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _flush(self, crcs: dict[str, int]) -> None:
        self._files.sync({self._shards.places[name].shard for name in crcs})
        self._journal.record(crcs)
