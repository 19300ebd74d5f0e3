"""What an evaluation found, as JSON beside the checkpoint: `eval.json`, one entry for each thing scored.

    {"format": 1, "results": [{"kind", "name", "data", "metrics": {name: {"value", "standard_error",
     "higher_is_better"}}, "versions", "date"}]}

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

from upcycle import whole_file
from upcycle.checkpoint import file_hash
from upcycle.errors import UpcycleError
from upcycle.evaluate.differences import Sums

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
        entries.append({**result.as_json(), "versions": versions | of_tasks, "date": now})
    return entries


def refuse_target(path: Path) -> None:
    """Refuse a file for results that is anything but results: nothing else is ever overwritten."""
    if path.is_dir():
        raise UpcycleError(f"{path} is a folder; name the file to write")
    if not path.exists():
        return
    try:
        found = _parsed(path)
    except (OSError, ValueError, RecursionError):
        found = None
    lists = (found.get("checkpoints"), found.get("results")) if isinstance(found, dict) else ()
    ours = isinstance(found, dict) and found.get("format") == FORMAT
    if not (ours and any(isinstance(each, list) for each in lists)):
        raise UpcycleError(
            f"{path} exists and was not written by `upcycle eval`; nothing else is overwritten. Choose "
            f"another name or delete it"
        )


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
