"""A pool of file descriptors: many files are used, but few are open at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MOST = 64


@dataclass
class _Opened:
    descriptor: int
    users: int = 0


class OpenFiles:
    """Files that are opened with `flags` on demand; the unused ones that are oldest are closed."""

    def __init__(self, flags: int, most: int = MOST) -> None:
        self._flags, self._most = flags, most
        self._opened: dict[Path, _Opened] = {}  # the most recently used is last
        self._lock = threading.Lock()

    @contextmanager
    def use(self, path: Path) -> Iterator[int]:
        """Yield a descriptor of `path` that stays open during the block."""
        with self._lock:
            file = self._opened.pop(path, None) or _Opened(os.open(path, self._flags, 0o644))
            self._opened[path] = file
            file.users += 1
            self._close_idle()
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.users -= 1

    def _close_idle(self) -> None:
        for path, file in list(self._opened.items())[: max(0, len(self._opened) - self._most)]:
            if not file.users:
                os.close(self._opened.pop(path).descriptor)

    def close(self) -> None:
        """Close all open files."""
        with self._lock:
            while self._opened:
                os.close(self._opened.popitem()[1].descriptor)
