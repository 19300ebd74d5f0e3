"""What makes a table of a run that of the same run: all that decides its numbers, and not how far it goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.training.stages import LENGTH

_FREE = ("parallel", "log", "checkpoint", "spikes", "eval", "out")
_FREE_IN_TRAIN = ("micro_batch", "compile")


def identity_of(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a table of `Run.as_table` that a run keeps when it goes on."""
    return _without({k: v for k, v in table.items() if k not in _FREE}, _FREE_IN_TRAIN)


def of_any_length(identity: Any) -> Any:
    """Return an identity without the length of the run, which is that of its last stage if it has stages."""
    if not isinstance(identity, dict):
        return identity
    out = _without(identity, LENGTH)
    if isinstance(stages := identity.get("stage"), list) and stages and isinstance(stages[-1], dict):
        out["stage"] = [*stages[:-1], _without(stages[-1], LENGTH)]
    return out


def _without(table: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return a table without some keys of its [train]."""
    train = table.get("train")
    if not isinstance(train, dict):
        return dict(table)
    return {**table, "train": {k: v for k, v in train.items() if k not in keys}}
