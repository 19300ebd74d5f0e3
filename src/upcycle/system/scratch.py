"""Temporary folders that also go where the process that made them was killed: at the next one's start."""

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
    """A temporary folder, held by a lock that falls with its process, and removed at the end."""
    _clear()
    made, descriptor = _made()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(descriptor)


def _made() -> tuple[Path, int]:
    """A new folder, and a descriptor that holds it."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=_PREFIX))
        try:
            descriptor = os.open(made, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process cleared it away before it was held
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if made.exists():
            return made, descriptor
        os.close(descriptor)


def _clear() -> None:
    """Remove what this user's processes left that nobody holds any more."""
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
            continue  # held: somebody is at work in it
        finally:
            os.close(descriptor)
