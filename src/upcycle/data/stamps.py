"""Checks that files have not changed since they were read: by their stamp, or by their SHA-256.

The system updates a file's ctime with every write and rename, whatever happens to its size and mtime, and no
program can set it. So a file with the same stamp has the same bytes. A file with another stamp may have been
copied, touched or changed, and only its hash can tell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from upcycle.checkpoints.checkpoint import file_hash

Stamp = list[int]  # size, mtime, ctime, inode


def stamp(path: Path) -> Stamp:
    """Return the stamp of a file, as JSON."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def stamps(paths: Iterable[Path]) -> dict[str, Stamp]:
    """Return the stamp of each file, by its path."""
    return {str(path): stamp(path) for path in paths}


def stamp_of_all(paths: Iterable[Path]) -> str:
    """Return one hash of the stamps of many files, in order."""
    return hashlib.sha256(json.dumps([stamp(path) for path in paths]).encode()).hexdigest()


def is_as_it_was(path: Path, before: Stamp, sha256: str) -> bool:
    """Return whether a file still has the bytes that it had with this stamp and hash."""
    return stamp(path) == before or file_hash(path) == sha256
