"""A conversion that kills its process before one of the calls by which it writes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from upcycle import Recipe
from upcycle.conversion import write


def convert(source: str, out: str, at: int, init: str, resume: bool) -> int:
    """Convert, and kill this process before call number `at`, if that is not 0; the number of calls."""
    count = 0

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    write.SYNC_EVERY = 60_000
    for where, names in (
        (os, ("pwrite", "fdatasync", "fsync")),
        (write.whole_file, ("write_json", "sync_folder")),
        (write.Path, ("rename", "unlink")),
    ):
        for name in names:
            setattr(where, name, killing(getattr(where, name)))
    write.convert(source, out, Recipe.of(init={"name": init}), shard_size=120_000, jobs=2, resume=resume)
    return count
