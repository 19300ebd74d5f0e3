"""Scripts of experiments, imported without what they leave in Python's tables, as several have one name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@contextmanager
def loaded(name: str) -> Iterator[ModuleType]:
    """The module of `name`, a script below `experiments/` or a folder with a run.py."""
    paths, modules = [*sys.path], {*sys.modules}
    path = EXPERIMENTS / f"{name}.py"
    path = path if path.exists() else EXPERIMENTS / name / "run.py"
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = paths
        for each in {*sys.modules} - modules:
            if EXPERIMENTS in Path(getattr(sys.modules[each], "__file__", None) or "/").parents:
                del sys.modules[each]
