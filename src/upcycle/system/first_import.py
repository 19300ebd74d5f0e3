"""A hook that is called when a module is first imported, by any code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import util
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, do: Callable[[], None]) -> None:
    """Call `do` as soon as the module `name` is loaded, or now if it is loaded already.

    The library wrapt does the same, but its import takes longer than a command takes to start.
    """
    if name in sys.modules:
        do()
    else:
        sys.meta_path.insert(0, _Waiting(name, do))


class _Waiting:
    """A finder that finds nothing itself, and removes itself when the module is imported."""

    def __init__(self, name: str, do: Callable[[], None]) -> None:
        self.name, self.do = name, do

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_do(module: ModuleType) -> None:
            load(module)
            self.do()

        spec.loader.exec_module = load_and_do  # type: ignore[method-assign]
        return spec
