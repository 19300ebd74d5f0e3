"""The journal of a conversion: what it was begun with, and which tensors are safely on disk."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError

JOURNAL = "journal.jsonl"


class Journal:
    """Which tensors are safely on disk: one JSON line each time they are synced."""

    def __init__(self, path: Path, begun: dict[str, Any]) -> None:
        """Open the journal of a run, or begin it; `begun` is what the run must have been begun with."""
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UpcycleError(f"another run is writing {path.parent}; wait for it or stop it") from None
        self.done: set[str] = set()
        lines = self._read()
        if not lines:
            self._append(begun)
        elif lines[0] != begun:
            different = ", ".join(k for k in begun if lines[0].get(k) != begun[k])
            self._file.close()
            raise UpcycleError(
                f"{path.parent} was begun with another {different}; resume with what it was begun with, "
                f"or delete it"
            )
        for line in lines[1:]:
            self.done.update(line["done"])

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines; a line that a crash cut short is cut off."""
        self._file.seek(0)
        raw = self._file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) != len(raw):
            self._file.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def record(self, names: list[str]) -> None:
        """Note that these tensors are on disk."""
        self._append({"done": names})

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
