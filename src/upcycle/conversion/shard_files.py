"""The files of the shards while they are written."""

from __future__ import annotations

import os
import threading
import zlib
from pathlib import Path

import numpy as np

from upcycle.blueprints.shards import Extent, Shards
from upcycle.conversion import direct
from upcycle.system import whole_file
from upcycle.system.open_files import OpenFiles

_CHUNK = 8 << 20  # bytes read at a time


class ShardFiles:
    """The shard files, open for writing at any offset."""

    def __init__(self, partial: Path, shards: Shards) -> None:
        self.paths = [partial / name for name in shards.names]
        self.new = {  # shards that do not exist, whatever the journal says
            number
            for number, (path, size) in enumerate(zip(self.paths, shards.sizes, strict=True))
            if not path.exists() or path.stat().st_size != size
        }
        self.locks = [threading.Lock() for _ in self.paths]
        self.opened = OpenFiles(os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        self.direct = direct.Direct()
        for path, size in zip(self.paths, shards.sizes, strict=True):
            with self.opened.use(path) as descriptor:
                os.ftruncate(descriptor, size)
                direct.reserve(descriptor, size)
        whole_file.sync_folder(partial)
        whole_file.sync_folder(partial.parent)

    def write(self, place: Extent, start: int, data: np.ndarray) -> None:
        """Write `data` (uint8) at byte `start` of the tensor at `place`."""
        position, path = place.offset + start, self.paths[place.shard]
        done = self.direct.write(path, data, position)
        # Through the cache, the kernel also allows one write at a time, but the other threads would spin.
        with self.locks[place.shard], self.opened.use(path) as descriptor:
            for part in (slice(0, done.start), slice(done.stop, data.size)):
                view, at = data.data[part], position + part.start
                while view:
                    count = os.pwrite(descriptor, view, at)
                    view, at = view[count:], at + count

    def crc(self, place: Extent) -> int:
        """Return the CRC-32 of the tensor at `place` as it is on disk."""
        crc = 0
        with self.opened.use(self.paths[place.shard]) as descriptor:
            for start in range(0, place.nbytes, _CHUNK):
                size = min(_CHUNK, place.nbytes - start)
                crc = zlib.crc32(os.pread(descriptor, size, place.offset + start), crc)
        return crc

    def sync(self, shards: set[int]) -> None:
        """Flush the data of these shards to disk."""
        datasync = getattr(os, "fdatasync", os.fsync)  # macOS has only fsync
        for shard in sorted(shards):
            with self.opened.use(self.paths[shard]) as descriptor:
                datasync(descriptor)

    def close(self) -> None:
        """Close the open files."""
        self.opened.close()
        self.direct.close()
