"""Whether files are still those that were read: cheaply by what the system says, surely by their SHA-256.

The system changes a file's ctime with every write and rename, whatever becomes of its size and mtime, and no
program can set it. So a file whose stamp is as it was has the bytes it had; one whose stamp differs may have
been copied, touched or changed, and only its hash tells.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from upcycle.checkpoints.checkpoint import file_hash

Stamp = list[int]  # size, mtime, ctime, inode


def stamp(path: Path) -> Stamp:
    """What the system says of a file, as JSON has it."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def stamps(paths: Iterable[Path]) -> dict[str, Stamp]:
    """The stamp of each file, by its path."""
    return {str(path): stamp(path) for path in paths}


def is_as_it_was(path: Path, before: Stamp, sha256: str) -> bool:
    """Whether a file has the bytes it had when it had that stamp and that hash."""
    return stamp(path) == before or file_hash(path) == sha256
