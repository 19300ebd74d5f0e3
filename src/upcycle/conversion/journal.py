"""The journal of a conversion: its parameters, and which tensors are safely on disk.

Each line is a JSON object that ends with a checksum over itself and the line before. The first damaged line
ends the journal, and whatever comes after it is written again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError

JOURNAL = "journal.jsonl"
_CHECK = "check"
_FOLLOWS = {"shard size": "recipe"}  # what is another whenever something else is


class Journal:
    """The record of which tensors are safely on disk, with a line for each sync. Any thread may add lines.

    `done` (the CRC-32 of each tensor) and `notes` hold its content at the time it was opened.
    """

    def __init__(self, path: Path, begun: dict[str, Any]) -> None:
        """Open the journal of a run, or start it. A resumed run must have the same `begun`."""
        self.folder, self._path = path.parent, path
        self._lock, self._last = threading.Lock(), ""
        self.done: dict[str, int] = {}
        self.notes: dict[str, Any] = {}
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._open(begun)
        except BlockingIOError:
            self._file.close()
            raise UpcycleError(f"another run is writing {self.folder}; wait for it or stop it") from None
        except BaseException:
            self._file.close()
            raise

    def _open(self, begun: dict[str, Any]) -> None:
        self._file.seek(0)
        raw = self._file.read()
        if b"\n" not in raw and _written(begun, "").startswith(raw):
            self._file.truncate(0)
            self._append(begun)
            return
        lines, length = _whole(raw)
        if not lines:
            raise UpcycleError(
                f"{self._path} is damaged, or of another version of upcycle; delete {self.folder} and "
                f"convert again"
            )
        first = _without_times(lines[0])
        if first != begun:
            different = {key for key in begun if first.get(key) != begun[key]}
            named = [key for key in begun if key in different and _FOLLOWS.get(key) not in different]
            other = ", ".join(named) or "version of upcycle"
            raise UpcycleError(
                f"{self.folder} was begun with another {other}; resume with what it was begun with, or "
                f"delete it"
            )
        self._file.truncate(length)
        self._last = _check(raw[:length].splitlines()[-1])
        for line in lines[1:]:
            done = line.pop("done")
            self.done |= done if isinstance(done, dict) else {}  # an older version wrote no checksums
            self.notes |= line

    def _append(self, line: dict[str, Any]) -> None:
        with self._lock:
            written = _written(line, self._last)
            self._file.write(written)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._last = _check(written)

    def record(self, done: dict[str, int], **notes: Any) -> None:
        """Record the CRC-32 of each tensor that is on disk, and any notes."""
        self._append({"done": done, **notes})

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _without_times(begun: dict[str, Any]) -> dict[str, Any]:
    """Return the first line of a journal as this version writes it.

    Older versions wrote the size of a source file with the time of its last change.
    """
    files = begun.get("source")
    if not isinstance(files, dict):
        return begun
    sizes = {key: each[0] if isinstance(each, list) and each else each for key, each in files.items()}
    return begun | {"source": sizes}


def _written(line: dict[str, Any], before: str) -> bytes:
    """Return a line of the journal, to follow a line with the checksum `before`."""
    check = hashlib.sha256((before + json.dumps(line)).encode()).hexdigest()
    return json.dumps({**line, _CHECK: check}).encode() + b"\n"


def _check(written: bytes) -> str:
    """Return the checksum at the end of an undamaged line."""
    return str(json.loads(written)[_CHECK])


def _whole(raw: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the lines before the first damaged one, and the number of bytes that they take."""
    lines: list[dict[str, Any]] = []
    length, before = 0, ""
    for written in raw.splitlines(keepends=True):
        try:
            line = json.loads(written)
            del line[_CHECK]
            same = _written(line, before) == written
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        if not same:
            break
        lines.append(line)
        length, before = length + len(written), _check(written)
    return lines, length
