"""What lies beside a checkpoint's weights, and how alike its experts are.

A checkpoint is any folder with a config.json: exported from a run, converted, or dense.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.checkpoints.checkpoint import read_json
from upcycle.conversion import provenance
from upcycle.errors import UpcycleError
from upcycle.evaluation import results, routing_file
from upcycle.evaluation.differences import Sums
from upcycle.reporting.records import fit, is_number


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one evaluation of a checkpoint; those of equal `question` can be compared."""

    kind: str
    name: str
    data: str  # JSON: what it was scored on, and how
    metric: str
    value: float
    standard_error: float | None
    higher_is_better: bool
    sums: Sums | None = None  # of its units, where they can be paired with another model's
    units: str = ""  # a hash of what those are

    @property
    def question(self) -> tuple[str, str, str, str]:
        """Kind, name, data and metric."""
        return self.kind, self.name, self.data, self.metric


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """A checkpoint: where it comes from, how it scored, what its experts and routers look like."""

    name: str
    folder: Path
    made: Mapping[str, Any] | None  # upcycle.json
    scores: tuple[Score, ...]
    routing: Mapping[str, Any] | None  # routing.json
    anatomy: Mapping[str, Any] | None  # of a Mixture of Experts
    damage: tuple[str, ...]

    @property
    def training(self) -> Mapping[str, Any] | None:
        """What its provenance says of the run it was exported from."""
        listed = (self.made or {}).get("training")
        last = listed[-1] if isinstance(listed, list) and listed else None
        return last if isinstance(last, dict) and isinstance(last.get("run"), dict) else None


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder says that it is a model."""
    return (folder / "config.json").is_file()


def read_checkpoint(folder: Path, name: str) -> CheckpointRecord:
    """The checkpoint in `folder`, with everything that lies beside its weights; reads the experts."""
    damage: list[str] = []

    def attempt(read: Any) -> Any:
        try:
            return read()
        except (UpcycleError, OSError) as error:
            damage.append(str(error))
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            # What a damaged file does to its reader must not end the report on the others.
            damage.append(f"something beside its weights is damaged ({type(error).__name__}: {error})")
        return None

    made = (
        attempt(lambda: fit(provenance.read(folder), provenance.FILE))
        if (folder / provenance.FILE).exists()
        else None
    )
    return CheckpointRecord(
        name=name,
        folder=folder,
        made=made,
        scores=attempt(lambda: _scores(folder)) or (),
        routing=attempt(lambda: _formatted(folder / routing_file.FILE, routing_file.FORMAT)),
        anatomy=attempt(lambda: _anatomy(folder)),
        damage=tuple(damage),
    )


def _anatomy(folder: Path) -> dict[str, Any] | None:
    """Similarity of the experts; None where there are none."""
    from upcycle.inspection import inspect

    found = fit(inspect(folder), provenance.FILE)
    return found if any(layer["num_experts"] for layer in found["layers"]) else None


def _formatted(path: Path, wanted: int) -> dict[str, Any] | None:
    """A JSON file of ours; None where it is not there."""
    if not path.exists():
        return None
    found = fit(read_json(path, ""), path.name)
    if found.get("format") != wanted:
        raise UpcycleError(f"{path.name} has format {found.get('format')}; this version reads {wanted}")
    return found


def _scores(folder: Path) -> tuple[Score, ...]:
    """The finite numbers in eval.json."""
    found = _formatted(folder / results.FILE, results.FORMAT) or {"results": []}
    out = []
    try:
        for result in found["results"]:
            for metric, of in result["metrics"].items():
                value, error = float(of["value"]), of.get("standard_error")
                paired = (result.get("paired") or {}).get(metric) or {}
                if not math.isfinite(value):
                    continue
                out.append(
                    Score(
                        kind=str(result["kind"]),
                        name=str(result["name"]),
                        data=json.dumps(result.get("data"), sort_keys=True),
                        metric=str(metric),
                        value=value,
                        standard_error=float(error) if is_number(error) else None,
                        higher_is_better=bool(of["higher_is_better"]),
                        sums=results.read_sums(paired),
                        units=str(paired.get("units_sha256")),
                    )
                )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        raise UpcycleError(f"{results.FILE} is damaged; run `upcycle eval` again") from None
    return tuple(out)
