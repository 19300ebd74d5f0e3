"""What makes a table of a run that of the same run: all that decides its numbers, and not how far it goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.training.stages import LENGTH

_FREE = ("parallel", "log", "checkpoint", "spikes", "eval", "out")
_FREE_IN: Mapping[str, tuple[str, ...]] = {
    "train": ("micro_batch", "compile", "activation_checkpointing", "eval_every"),
    "data": ("cache",),
    "teacher": ("cache",),
}
ROWS_BEFORE_TOKENS = {"batch_size": "batch_tokens", "eval_examples": "eval_tokens"}  # keys of [train]


def identity_of(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a table of `Run.as_table` that a run keeps when it goes on.

    Of an identity it returns what is kept today: earlier versions kept more.
    """
    out = _kept({k: v for k, v in table.items() if k not in _FREE})
    if isinstance(stages := out.get("stage"), (list, tuple)):
        out["stage"] = [_kept(stage) if isinstance(stage, dict) else stage for stage in stages]
    return out


def of_any_length(identity: Any) -> Any:
    """Return an identity without the length of the run, which is that of its last stage if it has stages."""
    if not isinstance(identity, dict):
        return identity
    out = _without(identity, "train", LENGTH)
    if isinstance(stages := identity.get("stage"), list) and stages and isinstance(stages[-1], dict):
        out["stage"] = [*stages[:-1], _without(stages[-1], "train", LENGTH)]
    return out


def _kept(table: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(table)
    for section, keys in _FREE_IN.items():
        out = _without(out, section, keys)
    train = out.get("train")
    given = train if isinstance(train, dict) else {}
    unread = [tokens for rows, tokens in ROWS_BEFORE_TOKENS.items() if given.get(rows) is not None]
    return _without(out, "train", tuple(unread))


def _without(table: Mapping[str, Any], section: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return a table without some keys of one of its sections."""
    inner = table.get(section)
    if not isinstance(inner, dict):
        return dict(table)
    return {**table, section: {k: v for k, v in inner.items() if k not in keys}}
