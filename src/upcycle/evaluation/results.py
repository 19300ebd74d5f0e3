"""The results of an evaluation, and how they are written to `eval.json` beside the checkpoint.

A new result replaces the entry of the same kind and name.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from upcycle.checkpoints.checkpoint import CONFIG, file_hash
from upcycle.data.folders import files_below
from upcycle.errors import UpcycleError
from upcycle.evaluation.differences import Sums
from upcycle.records.evaluation import EvaluationEntry, EvaluationRecord, MetricRecord, PairedSums
from upcycle.records.reader import DamagedError, refuse_deep
from upcycle.system import claim, whole_file

MOST = 1 << 28  # the largest size of a file that is read, in bytes

Kind = Literal["text", "images", "chats", "few_shot", "tasks", "superglue"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The value of a metric with its standard error."""

    value: float
    standard_error: float | None
    higher_is_better: bool
    sums: Sums | None = None  # the sums it is computed from, if it can be paired with another model's
    per_token: bool = False  # such a metric cannot be compared across tokenizers

    @classmethod
    def of(cls, sums: Sums, *, higher_is_better: bool, per_token: bool = False) -> Metric:
        """Make the metric of `sums`."""
        return cls(
            value=sums.value,
            standard_error=sums.standard_error,
            higher_is_better=higher_is_better,
            sums=sums,
            per_token=per_token,
        )

    def record(self, tokenizer: str | None = None) -> MetricRecord:
        """Return the metric as it is written in `eval.json`; `tokenizer` identifies that of the model."""
        return MetricRecord(
            value=self.value,
            standard_error=self.standard_error,
            higher_is_better=self.higher_is_better,
            tokenizer=tokenizer if self.per_token else None,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The metrics of a model on one task or data set."""

    kind: Kind
    name: str
    data: Mapping[str, Any]  # a description of the data, as JSON
    metrics: Mapping[str, Metric]
    units: tuple[Any, ...] = ()  # identifies the units; two results with equal units can be paired
    more: Mapping[str, Any] = field(default_factory=dict)  # counts and the like, for the command's own JSON

    def entry(self, tokenizer: str | None = None) -> EvaluationEntry:
        """Return the entry for `eval.json`, still without paired sums, versions and date."""
        metrics = {name: metric.record(tokenizer) for name, metric in self.metrics.items()}
        return EvaluationEntry(kind=self.kind, name=self.name, data=dict(self.data), metrics=metrics)

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return self.entry().as_table()


# The metrics that a report can pair, by kind; those that do not depend on the tokenizer come first.
_PAIRED: Mapping[str, tuple[str, ...]] = {
    "text": ("bits_per_byte", "loss"),
    "images": ("accuracy",),
    "chats": ("loss",),
}
_MOST_UNITS = 100_000


def _paired(result: Result) -> dict[str, PairedSums] | None:
    """Return the sums of a metric, unit by unit, so that another checkpoint can be paired with it later.

    Returns None if no metric of the result can be paired.
    """
    found = next((n for n in _PAIRED.get(result.kind, ()) if n in result.metrics), None)
    sums = None if found is None else result.metrics[found].sums
    if found is None or sums is None or sums.strata is not None or len(sums.top) > _MOST_UNITS:
        return None
    units = hashlib.sha256(json.dumps(result.units, default=str).encode()).hexdigest()
    top, bottom = (tuple(numbers.tolist()) for numbers in (sums.top, sums.bottom))
    return {found: PairedSums(units=sums.units, units_sha256=units, top=top, bottom=bottom)}


def sums_of(paired: PairedSums | None) -> Sums | None:
    """Return the sums of a metric in `eval.json`; None if it has none."""
    if paired is None:
        return None
    top, bottom = np.array(paired.top, np.float64), np.array(paired.bottom, np.float64)
    if not np.isfinite([top, bottom]).all() or not (bottom > 0).all():
        return None
    return Sums(top=top, bottom=bottom, units=str(paired.units))


def data_of(path: Path) -> dict[str, Any]:
    """Describe the data that were scored: the file, or the files of a folder with name and size."""
    if path.is_file():
        return {"file": path.name, "sha256": file_hash(path)}
    files = files_below(path)
    listed = "\n".join(f"{p.relative_to(path)} {p.stat().st_size}" for p in files)
    return {
        "folder": path.resolve().name,
        "files": len(files),
        "names_and_sizes_sha256": hashlib.sha256(listed.encode()).hexdigest(),
    }


def stamped(results: Sequence[Result], tokenizer: str | None) -> list[EvaluationEntry]:
    """Return the entries for `eval.json`, with versions and date."""
    names = ("upcycle", "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entries = []
    for result in results:
        of_tasks = {"lm_eval": importlib.metadata.version("lm_eval")} if result.kind == "tasks" else {}
        entry = result.entry(tokenizer)
        entries.append(replace(entry, paired=_paired(result), versions=versions | of_tasks, date=now))
    return entries


def refuse_target(path: Path) -> None:
    """Raise an error if a comparison cannot be written to a file.

    That is so if the file exists and holds something else, or if it is where the scores of a checkpoint are
    recorded.
    """
    if path.name == EvaluationRecord.FILE and (path.parent / CONFIG).is_file():
        raise UpcycleError(
            f"{path} is for the scores of that checkpoint alone, and a comparison would replace them; leave "
            f"--out out to add to them, or choose another name"
        )
    claim.may_replace(path, _is_comparison, "what `upcycle eval --out` writes")


def _is_comparison(path: Path) -> bool:
    try:
        found = _parsed(path)
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(found, dict) or found.get("format") != EvaluationRecord.FORMAT:
        return False
    return isinstance(found.get("checkpoints"), list)


def record(folder: Path, results: Sequence[Result], tokenizer: str | None) -> Path:
    """Write `results` into the `eval.json` of a checkpoint's folder, in one step.

    `tokenizer` is a hash that identifies its tokenizer; None: no tokenizer was used.
    Raises `UpcycleError` if the folder cannot be written to, or if its `eval.json` is something else.
    """
    path = folder / EvaluationRecord.FILE
    new = stamped(results, tokenizer)
    again = {entry.place for entry in new}
    kept = [entry for entry in read(path).results if entry.place not in again]
    try:
        whole_file.write_json(path, EvaluationRecord(results=(*kept, *new)).as_table())
    except OSError as error:
        raise UpcycleError(
            f"{path} cannot be written ({error.strerror or error}); the results are above, and --out FILE "
            f"puts them elsewhere"
        ) from None
    return path


def read(path: Path) -> EvaluationRecord:
    """Read the scores in an `eval.json`; there are none if there is no file.

    Raises `UpcycleError` if the file is something else.
    """
    if not path.exists():
        return EvaluationRecord(results=())
    try:
        found = _parsed(path)
        if not isinstance(found, dict) or "format" not in found:
            raise ValueError
        refuse_deep(found, str(path))
        json.dumps(found, ensure_ascii=False).encode()  # fails for lone surrogates, which cannot be rewritten
        return EvaluationRecord.of(found, str(path))
    except DamagedError as error:
        why = f": {error.why}"
    except (OSError, ValueError, RecursionError, UpcycleError):
        why = ""
    raise UpcycleError(
        f"{path} is not what `upcycle eval` writes (format {EvaluationRecord.FORMAT}){why}; move it away"
    )


def _parsed(path: Path) -> Any:
    if path.stat().st_size > MOST:
        raise ValueError
    return json.loads(path.read_bytes())
