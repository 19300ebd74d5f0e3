"""Atomic writing of small files: a file gets its name only when all of it is on disk."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_MADE = re.compile(r"(.+)\.\d+-[0-9a-f]{8}\.partial", re.DOTALL)  # the names that `making` yields


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Add the name of the file to system errors, because the error of a full disk names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def making(path: Path) -> Iterator[Path]:
    """Yield the name under which the file `path` is made; it gets its own name at the end of the block.

    The folder is created. If the block raises, nothing is left of the file, and an older one stays. No two
    such names are the same, although processes on two machines may have the same number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def filling(path: Path) -> Iterator[IO[bytes]]:
    """Yield the open file that becomes `path` at the end of the block, when all of it is on disk.

    Several processes may fill the same path: each writes a file of its own, and the last one stays. If the
    block raises, nothing is left, and an older file stays.
    """
    with making(path) as partial, named(path), partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write(path: Path, data: bytes) -> None:
    """Write `path` and create its folder; the old file stays until the new one is on disk."""
    with filling(path) as file:
        file.write(data)


def clear(folder: Path) -> None:
    """Delete the half-written files that a killed process left in `folder`; nobody else may write there."""
    _clear(folder, None)


def clear_of(path: Path) -> None:
    """Delete what a killed process left of the file `path`; nobody else may write that file."""
    _clear(path.parent, path.name)


def _clear(folder: Path, name: str | None) -> None:
    """Delete the half-written files in `folder` that were to get this name; None: any name."""
    for left in folder.glob("*.partial"):
        made = _MADE.fullmatch(left.name)
        if made and name in (None, made[1]) and left.is_file():
            left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text to `path` as UTF-8, like `write`."""
    write(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write a value to `path` as JSON, like `write`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync_all(folder: Path) -> None:
    """Sync every file in `folder` and below it to disk, and their names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Sync `folder` to disk, so that names added or removed in it survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
