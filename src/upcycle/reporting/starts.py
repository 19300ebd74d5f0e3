"""The cost of the model that a run starts from: training FLOPs and tokens, if files record them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.records.provenance import Provenance
from upcycle.reporting.runs import RunHistory


@dataclass(frozen=True, kw_only=True)
class DenseCost:
    """The cost of the dense checkpoint as given by the user; it is used if no file records it."""

    flops: float | None = None
    tokens: float | None = None


@dataclass(frozen=True, kw_only=True)
class StartCost:
    """The training FLOPs and tokens of a start; None if unknown. `why` explains it in words."""

    flops: float | None
    tokens: float | None
    why: str


def start_cost(run: RunHistory, given: DenseCost) -> StartCost:
    """Return the cost of the start of `run`.

    It is zero from scratch. Otherwise it is what the provenance of the source records, followed back through
    the sources to random weights.
    """
    if run.about.from_scratch:
        return StartCost(flops=0.0, tokens=0.0, why="starts from random weights")
    others = _others(run.table)
    if others:
        return _told(given, f"it is made of more than one checkpoint ({', '.join(others)})")
    return _of_folder(Path(run.about.source.path), given, seen=())


def _others(table: Mapping[str, Any]) -> list[str]:
    """Return the keys of a run file that name checkpoints other than the source."""
    init = table.get("init") or {}
    rest = (table.get("successor") or {}).get("rest", "predecessor")
    named = [f"init.{key}" for key in ("sources", "expert") if init.get(key)]
    return named + ["successor.rest"] * (rest != "predecessor")


def _of_folder(folder: Path, given: DenseCost, seen: tuple[Path, ...]) -> StartCost:
    if not folder.is_dir():
        return _told(given, f"{folder.name} is not there any more")
    if folder in seen:
        return _told(given, f"the provenance of {folder.name} names itself")
    if not (folder / Provenance.FILE).exists():
        return _told(given, f"{folder.name} does not say how it was trained")
    try:
        made = Provenance.read(folder)
    except (UpcycleError, OSError):
        return _told(given, f"the provenance of {folder.name} is damaged")
    trainings = made.training or ()
    tokens = sum(float(t.tokens) for t in trainings)
    flops = sum(t.spent for t in trainings)
    if not math.isfinite(flops + tokens):
        return _told(given, f"the provenance of {folder.name} is damaged")
    source = made.source.seen_from(folder)
    if any(t.from_scratch for t in trainings):
        return StartCost(flops=flops, tokens=tokens, why=f"{folder.name} was trained from random weights")
    if made.source.donors:
        return _told(given, f"{folder.name} is made of more than one checkpoint")
    before = _of_folder(source, given, (*seen, folder))
    return StartCost(
        flops=None if before.flops is None else before.flops + flops,
        tokens=None if before.tokens is None else before.tokens + tokens,
        why=f"{folder.name} goes on from {source.name}: {before.why}",
    )


def _told(given: DenseCost, why: str) -> StartCost:
    """Return the cost given by the user, or an unknown cost."""
    if given.flops is None and given.tokens is None:
        return StartCost(flops=None, tokens=None, why=why)
    return StartCost(flops=given.flops, tokens=given.tokens, why=f"{why}; the cost is the one given")
