"""A lock on the output of a command, so that no second command writes there at the same time."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upcycle.errors import UpcycleError


@contextmanager
def held(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path`, which is created for it and removed at the end; its folder must exist.

    The operating system releases the lock when the process dies. Raises `UpcycleError` with the sentence
    `busy` if another process holds it, and also if the file is not a lock file of ours.
    """
    descriptor = _taken(path, busy)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # removed while held, so that a waiting process sees that it is gone
        os.close(descriptor)


def _taken(path: Path, busy: str) -> int:
    """Return a descriptor that holds the lock on the file that has this name now."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if path.is_symlink() or path.is_dir():
                raise _in_the_way(path) from None
            raise error
        try:
            opened = os.fstat(descriptor)
            if not stat.S_ISREG(opened.st_mode) or opened.st_size:
                raise _in_the_way(path)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, opened):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise UpcycleError(busy) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between the two calls


def _is_still(path: Path, opened: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.lstat(), opened)
    except FileNotFoundError:
        return False


def _in_the_way(path: Path) -> UpcycleError:
    return UpcycleError(f"{path} is in the way of a lock, and it was not left by upcycle; move it away")
