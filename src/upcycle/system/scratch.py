"""Temporary folders. Those of a process that was killed are removed when the next one starts."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "upcycle-scratch-"


@contextmanager
def folder() -> Iterator[Path]:
    """Yield a temporary folder; it is locked while its process lives, and removed at the end."""
    _clear()
    made, descriptor = _made()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(descriptor)


def _made() -> tuple[Path, int]:
    """Make a new folder, and return it with the descriptor of its lock."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=_PREFIX))
        try:
            descriptor = os.open(made, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process removed it before it was locked
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if made.exists():
            return made, descriptor
        os.close(descriptor)


def _clear() -> None:
    """Remove the folders that this user's dead processes left behind."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if os.fstat(descriptor).st_uid == os.getuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue  # locked: a process uses it
        finally:
            os.close(descriptor)
