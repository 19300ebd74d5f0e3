"""Makes upcycled models known to transformers when its registry is imported, and not before.

A command must not wait for transformers; whoever imports both must not have to think of an order. No library:
wrapt, which does this, takes longer to import than the rest of a command's start.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module, util
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.models.auto.configuration_auto"


def announce() -> None:
    """Register now, if transformers' registry is there already, or as soon as it is."""
    if REGISTRY in sys.modules:
        import_module("upcycle.hf.configs")
    else:
        sys.meta_path.insert(0, _Registrar())


class _Registrar:
    """A finder that finds nothing, but lets the registry be followed by our configs."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            import_module("upcycle.hf.configs")  # registers as it is imported

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
