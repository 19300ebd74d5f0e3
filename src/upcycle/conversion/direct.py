"""Writes past the page cache (O_DIRECT), where the file system can do that.

Of a copied model, each expert is the same bytes from the same buffer. Through the page cache, the kernel
copies them once for every expert, into pages that it must find first. That copy was two thirds of the
processor time of a conversion, and the part that grows on a busy machine. Past the cache, the device fetches
them itself.

A block on disk must lie at the same place within a block of memory. So the bytes are copied once to a buffer
where they do, and all experts of the usual shapes are written from there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from pathlib import Path

import numpy as np

from upcycle.system.open_files import OpenFiles

BLOCK = 4096  # bytes; no device in use asks for more
LEAST = 1 << 16  # bytes for which it is worth it
_FLAG = getattr(os, "O_DIRECT", 0)  # macOS has none


def reserve(descriptor: int, size: int) -> None:
    """Reserve the blocks of a file, where the file system can.

    In a hole, the kernel lets one thread write at a time. `os.posix_fallocate` would write to every block
    itself if the file system cannot do it, so this calls the system.
    """
    with contextlib.suppress(AttributeError):  # macOS has no such call
        call = ctypes.CDLL(None, use_errno=True).fallocate
        call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        call(descriptor, 0, 0, size)  # if it fails, the writes will say why


class Direct:
    """The same files as another set of descriptors, for whole blocks. Threads may share it."""

    def __init__(self) -> None:
        self._opened = OpenFiles(os.O_WRONLY | os.O_NOFOLLOW | _FLAG)
        self._able = bool(_FLAG)
        self._buffers = threading.local()

    def write(self, path: Path, data: np.ndarray, position: int) -> slice:
        """Write the whole blocks of `data` (uint8) at byte `position`; return the part that is written.

        That part is empty if there is too little, or if the file system cannot do it.
        """
        first, last = -position % BLOCK, data.size - (position + data.size) % BLOCK
        if not self._able or last - first < LEAST:
            return slice(0, 0)
        view = self._placed(data, position % BLOCK)[first:last]
        at = first
        try:
            with self._opened.use(path) as descriptor:
                while view:
                    count = os.pwrite(descriptor, view, position + at)
                    view, at = view[count:], at + count
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._able = False
        return slice(first, at)

    def _placed(self, data: np.ndarray, offset: int) -> memoryview:
        """Return a copy of `data` that begins `offset` bytes behind a block; the last one is used again."""
        own = self._buffers
        if getattr(own, "data", None) is not data or own.offset != offset:
            if getattr(own, "memory", None) is None or len(own.memory) < offset + data.size:
                own.memory = mmap.mmap(-1, BLOCK + data.size)
            np.frombuffer(own.memory, np.uint8)[offset : offset + data.size] = data
            own.data, own.offset = data, offset
        return memoryview(own.memory)[offset : offset + data.size]

    def close(self) -> None:
        """Close the open files."""
        self._opened.close()
