"""What an evaluation found, as JSON beside the checkpoint: `eval.json`, one entry for each thing scored.

    {"format": 1, "results": [{"kind", "name", "data", "metrics": {name: {"value", "standard_error",
     "higher_is_better"}}, "paired": {name: {"units", "units_sha256", "top", "bottom"}}, "versions", "date"}]}

`paired` are the sums of one metric, unit by unit (`differences.Sums`), where a report can pair them.

The same kind and name scored again replaces its entry.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from upcycle.checkpoints.checkpoint import file_hash
from upcycle.errors import UpcycleError
from upcycle.evaluation.differences import Sums
from upcycle.system import claim, whole_file

FILE = "eval.json"
FORMAT = 1
MOST = 1 << 28  # bytes of a file that is looked at

Kind = Literal["text", "images", "few_shot", "tasks", "superglue"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number, and how sure it is."""

    value: float
    standard_error: float | None
    higher_is_better: bool
    sums: Sums | None = None  # what it is made of, where another model's can be paired with it
    per_token: bool = False  # whether it counts by token, and so says nothing across tokenizers

    @classmethod
    def of(cls, sums: Sums, *, higher_is_better: bool, per_token: bool = False) -> Metric:
        """The metric that `sums` make."""
        return cls(
            value=sums.value,
            standard_error=sums.standard_error,
            higher_is_better=higher_is_better,
            sums=sums,
            per_token=per_token,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What a model scores on one thing."""

    kind: Kind
    name: str
    data: Mapping[str, Any]  # what was scored, as JSON has it
    metrics: Mapping[str, Metric]
    units: tuple[Any, ...] = ()  # what tells units from those of other data; equal where they can be paired
    more: Mapping[str, Any] = field(default_factory=dict)  # counts and the like, for the command's own JSON

    def as_json(self) -> dict[str, Any]:
        """The entry in `eval.json`, without versions and date."""
        shown = ("value", "standard_error", "higher_is_better")
        return {
            "kind": self.kind,
            "name": self.name,
            "data": dict(self.data),
            "metrics": {n: {key: getattr(m, key) for key in shown} for n, m in self.metrics.items()},
        }


# The metric of each kind that a report pairs: one that says the same under any tokenizer, where there is one.
_PAIRED: Mapping[str, tuple[str, ...]] = {"text": ("bits_per_byte", "loss"), "images": ("accuracy",)}
_MOST_UNITS = 100_000


def _paired(result: Result) -> dict[str, Any]:
    """What a metric is made of, unit by unit, so that another checkpoint's can be paired with it later."""
    found = next((n for n in _PAIRED.get(result.kind, ()) if n in result.metrics), None)
    sums = None if found is None else result.metrics[found].sums
    if found is None or sums is None or sums.strata is not None or len(sums.top) > _MOST_UNITS:
        return {}
    units = hashlib.sha256(json.dumps(result.units, default=str).encode()).hexdigest()
    made = {
        "units": sums.units, "units_sha256": units, "top": sums.top.tolist(), "bottom": sums.bottom.tolist(),
    }  # fmt: skip
    return {"paired": {found: made}}


def read_sums(paired: Any) -> Sums | None:
    """What `eval.json` says that a metric is made of; None where it does not."""
    if not isinstance(paired, dict) or not isinstance(paired.get("units_sha256"), str):
        return None
    try:
        top, bottom = (np.array(paired[key], np.float64) for key in ("top", "bottom"))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    whole = top.ndim == 1 and top.shape == bottom.shape and top.size and bool((bottom > 0).all())
    if not whole or not np.isfinite([top, bottom]).all():
        return None
    return Sums(top=top, bottom=bottom, units=str(paired.get("units")))


def data_of(path: Path) -> dict[str, Any]:
    """Which file was scored; of a folder, its files by name and size."""
    if path.is_file():
        return {"file": path.name, "sha256": file_hash(path)}
    files = sorted(p for p in path.rglob("*") if p.is_file())
    listed = "\n".join(f"{p.relative_to(path)} {p.stat().st_size}" for p in files)
    return {
        "folder": path.resolve().name,
        "files": len(files),
        "names_and_sizes_sha256": hashlib.sha256(listed.encode()).hexdigest(),
    }


def stamped(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The entries of `eval.json`, with versions and date."""
    names = ("upcycle", "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entries = []
    for result in results:
        of_tasks = {"lm_eval": importlib.metadata.version("lm_eval")} if result.kind == "tasks" else {}
        entries.append({**result.as_json(), **_paired(result), "versions": versions | of_tasks, "date": now})
    return entries


def refuse_target(path: Path) -> None:
    """Refuse a file for results that is anything but results."""
    claim.may_replace(path, _is_ours, "what `upcycle eval` writes")


def _is_ours(path: Path) -> bool:
    try:
        found = _parsed(path)
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return False
    return any(isinstance(found.get(key), list) for key in ("checkpoints", "results"))


def record(folder: Path, results: Sequence[Result]) -> Path:
    """Put `results` into the `eval.json` of a checkpoint's folder, whole or not at all.

    Raises `UpcycleError` where the folder cannot be written to, or holds an `eval.json` of something else.
    """
    path = folder / FILE
    new = stamped(results)
    again = {(entry["kind"], entry["name"]) for entry in new}
    kept = [entry for entry in read(path) if (entry["kind"], entry["name"]) not in again]
    try:
        write(path, {"format": FORMAT, "results": kept + new})
    except OSError as error:
        raise UpcycleError(
            f"{path} cannot be written ({error.strerror or error}); the results are above, and --out FILE "
            f"puts them elsewhere"
        ) from None
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of an `eval.json`; none without a file. Raises `UpcycleError` where it is none."""
    if not path.exists():
        return []
    try:
        found = _parsed(path)
        if found["format"] != FORMAT or not all(
            isinstance(entry[key], str) for entry in found["results"] for key in ("kind", "name")
        ):
            raise ValueError
        json.dumps(found, ensure_ascii=False).encode()  # no lone surrogates, which cannot be written again
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UpcycleError(
            f"{path} is not what `upcycle eval` writes (format {FORMAT}); move it away"
        ) from None
    entries: list[dict[str, Any]] = found["results"]
    return entries


def _parsed(path: Path) -> Any:
    if path.stat().st_size > MOST:
        raise ValueError
    return json.loads(path.read_bytes())


def write(path: Path, value: object) -> None:
    """Write JSON to `path`; what was there stays until the new file is on disk."""
    whole_file.write(path, (json.dumps(value, indent=2) + "\n").encode())
