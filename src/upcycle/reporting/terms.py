"""The terms of a run: what runs must share for their held-out numbers to be comparable."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from upcycle import tasks
from upcycle.reporting.labels import flat, short
from upcycle.reporting.runs import RunHistory
from upcycle.training.beside import kept_tokenizer

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def terms_of(run: RunHistory, runs: Sequence[RunHistory]) -> dict[str, Any]:
    """Return the settings that runs must share for their held-out numbers to be comparable."""
    train = run.table["train"]
    task = {k: v for k, v in (run.table.get("task") or {}).items() if v and k not in ("augment", "name")}
    length = train.get("sequence_length", 1024)
    by_example = run.about.task.startswith("image")
    rows = train.get("eval_examples") or (None if by_example else train.get("eval_tokens", 0) // length)
    return {
        "task": run.about.task,
        "family of models": run.about.source.model_type,
        "held-out data": _held_out_data(run),
        "settings of the task": task,
        "rows that are held out": {"length": None if by_example else length, "rows": rows},
        "tokenizer": None if by_example else _tokenizer(run, runs),
    }


def _held_out_data(run: RunHistory) -> dict[str, Any]:
    """Return what says which rows are held out, and what they are seen with, stage by stage."""
    whole = run.table["data"]
    tables = [stage.get("data") or whole for stage in run.table.get("stage") or ()] or [whole]
    found = [
        {
            "sources": data.get("sources"),
            "share": data.get("held_out", 0.0),
            "isolate": data.get("isolate", False),
            **({"split": data.get("split_seed", run.seed)} if _draws(run) else {}),
        }
        for data in tables
    ]
    apart = [data for data, _ in groupby(found)]
    return apart[0] if len(apart) == 1 else {**apart[0], "then": apart[1:]}


def _draws(run: RunHistory) -> bool:
    """Return whether the held-out rows of a run were drawn from its data."""
    name, task = run.about.task, run.table.get("task") or {}
    return name in tasks.names() and tasks.find(name).splits and not task.get("test")


def _tokenizer(run: RunHistory, runs: Sequence[RunHistory]) -> str:
    """Identify a tokenizer by its bytes, or by the name of its folder if the folder is gone.

    The tokenizer of a source that is gone is that of another run which began with the same source.
    """
    if (named := _named(run)) is not None:
        return _bytes_in(kept_tokenizer(run.folder)) or _bytes_in(Path(named)) or named
    alike = [other for other in runs if _named(other) is None and run.shares_source(other)]
    folders = [each.about.source.path for each in (run, *alike)]
    return next(filter(None, map(_bytes_in, map(Path, folders))), alike[0].about.source.path)


def _named(run: RunHistory) -> str | None:
    """Return the tokenizer that the run file names; None if it is the source's."""
    named = run.table["data"].get("tokenizer")
    return str(named) if named else None


def _bytes_in(folder: Path) -> str | None:
    """Return what identifies the tokenizer in a folder; None if there is none."""
    for name in _TOKENIZERS:
        if (path := folder / name).is_file():
            return f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    return None


def difference_in(name: str, own: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """Say in which setting below the term `name` a run differs from the terms of the runs compared."""
    theirs, ours = (dict(flat(t[name], name)) for t in (own, reference))
    key = next(k for k in [*ours, *theirs] if theirs.get(k) != ours.get(k))
    found, wanted = (short(str(leaves.get(key, "not set")), 80) for leaves in (theirs, ours))
    return f"other {name}: {found}, where the runs compared have {wanted} ({key})"
