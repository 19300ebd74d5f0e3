"""Native MoE architectures of transformers. Each file here is one `model_type`: its names and its config.

A file `MODEL_TYPE.py` binds a `Native` to the module name `native`. Names are those of the hub's own
checkpoints of that architecture, per expert, so that every client can load the output.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from upcycle import registry

if TYPE_CHECKING:
    from upcycle.targets.native import Native


def find(model_type: str) -> Native:
    """Return the native architecture called `model_type`."""
    return registry.find(sys.modules[__name__], model_type, "native", "target")


def names() -> list[str]:
    """Return the native architectures that have a file here."""
    return registry.names(sys.modules[__name__])


def with_dense_layers() -> list[str]:
    """Return the architectures in which some layers can stay dense."""
    return [name for name in names() if find(name).dense_layers is not None]


def growing() -> list[str]:
    """Return the architectures that can be a source that grows."""
    return [name for name in names() if find(name).growing is not None]
