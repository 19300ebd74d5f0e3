"""A cache for work that several threads ask for at once and that only one should do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Cell:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.value: list[Any] = []


def once(maxsize: int) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Cache the last `maxsize` results by arguments; a thread that asks for one in progress waits for it."""

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        cells, lock = lru_cache(maxsize)(lambda *_: _Cell()), threading.Lock()

        @wraps(function)
        def wrapped(*args: Any) -> Result:
            with lock:
                cell = cells(*args)
            with cell.lock:
                if not cell.value:
                    cell.value.append(function(*args))
                return cell.value[0]

        return wrapped

    return decorate
