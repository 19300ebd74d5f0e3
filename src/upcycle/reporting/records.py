"""What a run left behind in its folder, read without torch; what is wrong with it is said, not hidden."""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.checkpoints.checkpoint import read_json
from upcycle.errors import UpcycleError
from upcycle.reporting.document import clean
from upcycle.system import wording
from upcycle.training.run import train_of

RUN = "run.json"
METRICS = "metrics.jsonl"
FORMAT = 1
DEPTH = 64  # levels of a JSON file
TAIL = 50  # last steps that the load of experts is averaged over
_LARGEST = 1 << 60  # steps, tokens, FLOPs of a row
_SPEEDS = ("seconds", "tokens_per_s", "active_flops_per_s", "mfu", "peak_memory")
_HEALTH = ("entropy", "dead", "collapsed", "left_behind")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Numbers on held-out rows, in the order of training; before the first step where it was measured."""

    tokens: np.ndarray  # [n]
    loss: np.ndarray  # [n], nats
    accuracy: np.ndarray  # [n], NaN where it was not recorded


@dataclass(frozen=True, kw_only=True)
class Health:
    """What the routers of a run did: n steps, L layers of E experts (E may differ)."""

    places: tuple[str, ...]  # [L]
    tokens: np.ndarray  # [n]
    entropy: np.ndarray  # [n, L], over log E
    dead: np.ndarray  # [n, L], experts that got nothing
    collapsed: np.ndarray  # [n, L]
    left_behind: np.ndarray  # [n, L], share of tokens
    load: tuple[np.ndarray, ...]  # L times [E], shares of the slots, mean over the last steps
    steps: int  # that the load is of


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run: what it was asked to do, and how far it went."""

    name: str
    folder: Path
    about: Mapping[str, Any]  # run.json
    total_steps: int
    rows: int  # of the global batch
    steps: np.ndarray  # [n], steps that were recorded
    loss: np.ndarray  # [n], of training
    held_out: Curve
    speeds: Mapping[str, np.ndarray]  # by name, [n], NaN where it was not recorded
    health: Health | None
    damage: tuple[str, ...]  # sentences on what could not be read

    @property
    def table(self) -> Mapping[str, Any]:
        """The run file."""
        found: Mapping[str, Any] = self.about["run"]
        return found

    @property
    def done(self) -> int:
        """Steps that were recorded."""
        return int(self.steps[-1]) if self.steps.size else 0

    @property
    def unfinished(self) -> bool:
        """Whether its metrics end before its last step."""
        return self.done < self.total_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.rows * int(self.about["tokens_per_row"])

    def flops(self, tokens: np.ndarray) -> np.ndarray:
        """Training FLOPs of its own after so many tokens (active weights only)."""
        return tokens / self.about["tokens_per_row"] * self.about["training_flops_per_row"]


def is_run(folder: Path) -> bool:
    """Whether a folder says that it is a run."""
    return (folder / RUN).is_file()


def read_run(folder: Path, name: str) -> RunRecord:
    """The run in `folder`; an `UpcycleError` where run.json does not say what was run."""
    about = _about(folder)
    wanted = train_of(about["run"])
    per_step = wanted.rows * about["tokens_per_row"]
    damage: list[str] = []
    kept: list[dict[str, Any]] = []
    health: list[list[list[float]]] = []
    places: tuple[str, ...] = ()
    tail: deque[list[list[float]]] = deque(maxlen=TAIL)
    for record in _lines(folder / METRICS, damage):
        if record["tokens"] != record["step"] * per_step:
            raise UpcycleError(
                f"its {METRICS} is of another run than its {RUN}: step {record['step']} says "
                f"{record['tokens']:,} tokens, where {record['step'] * per_step:,} are due"
            )
        layers = record.pop("layers", None)
        kept.append(record)
        if not layers:
            continue
        try:
            here = tuple(place_of(layer) for layer in layers)
            row = [[float(layer[key]) for layer in layers] for key in _HEALTH]
            loads = [shares(layer["load"]) for layer in layers]
            if not np.isfinite(row).all():
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            damage.append(f"what its routers did at step {record['step']} cannot be read")
            continue
        if places and here != places:
            damage.append(f"its layers change at step {record['step']}; router health ends before")
            continue
        places = here
        health.append([[float(record["tokens"])] * len(here), *row])
        tail.append(loads)
    return RunRecord(
        name=name,
        folder=folder,
        about=about,
        total_steps=wanted.total_steps,
        rows=wanted.rows,
        steps=np.array([r["step"] for r in kept], np.int64),
        loss=_column(kept, "loss"),
        held_out=_held_out(kept),
        speeds={key: _column(kept, key) for key in _SPEEDS},
        health=_health(places, health, tail),
        damage=tuple(dict.fromkeys(damage)),
    )


def _about(folder: Path) -> dict[str, Any]:
    """run.json, with the keys that a report needs."""
    about = fit(read_json(folder / RUN, f"it has no {RUN}"), RUN)
    if about.get("format") != FORMAT:
        raise UpcycleError(f"its {RUN} has format {about.get('format')}; this version reads {FORMAT}")
    needed = {
        "run": dict, "source": dict, "task": str, "architecture": str, "tokens_per_row": int,
        "training_flops_per_row": int, "parameters": int, "active_parameters": int, "from_scratch": bool,
    }  # fmt: skip
    wrong = [key for key, kind in needed.items() if type(about.get(key)) is not kind]
    counted = ("tokens_per_row", "training_flops_per_row")
    wrong = wrong or [key for key in counted if not 1 <= about[key] <= _LARGEST]
    if not wrong:
        wrong = [f"source.{key}" for key in ("name", "path", "model_type") if key not in about["source"]]
        table = about["run"]
        wrong += [f"run.{key}" for key in ("train", "data") if not isinstance(table.get(key), dict)]
        optional = ("moe", "init", "router", "task", "successor")
        wrong += [f"run.{key}" for key in optional if not isinstance(table.get(key, {}), dict)]
    if wrong:
        raise UpcycleError(f"its {RUN} is damaged: {', '.join(wrong)}")
    return about


def fit(value: dict[str, Any], name: str) -> dict[str, Any]:
    """What a JSON file holds, with texts that can be shown; refused if it is nested deeper than ours are."""
    found: dict[str, Any] = _fit(value, name, DEPTH)
    return found


def _fit(value: Any, name: str, room: int) -> Any:
    if isinstance(value, str):
        return clean(value)
    if not isinstance(value, (dict, list)):
        return value
    if not room:
        raise UpcycleError(f"its {name} is nested deeper than {DEPTH} levels, which no file of upcycle is")
    if isinstance(value, list):
        return [_fit(inner, name, room - 1) for inner in value]
    return {clean(key): _fit(inner, name, room - 1) for key, inner in value.items()}


def _lines(path: Path, damage: list[str]) -> Iterator[dict[str, Any]]:
    """The records of a metrics file up to the first one that cannot be used, which is said in `damage`."""
    if not path.is_file():
        damage.append(f"it has no {METRICS}: no step was recorded")
        return
    before = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                numbers = [record[key] for key in ("step", "tokens", "loss")]
                if not all(is_number(n) for n in numbers) or max(map(abs, numbers[:2])) > _LARGEST:
                    raise ValueError
                if record["step"] <= before:
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError):
                cut = not line.endswith(b"\n")
                what = "was cut off, as a kill leaves it" if cut else "is damaged; nothing after it is shown"
                damage.append(f"line {number} of its {METRICS} {what}")
                return
            before = record["step"]
            yield record


def _column(records: list[dict[str, Any]], key: str) -> np.ndarray:
    """One number of every record, [n]; NaN where it is not there or no number."""
    found: list[Any] = [r.get(key) for r in records]
    return np.array([float(v) if type(v) is float or is_number(v) else math.nan for v in found])


def _held_out(records: list[dict[str, Any]]) -> Curve:
    points: list[tuple[float, Any, Any]] = []
    if records and is_number(records[0].get("held_out_start")):
        first = records[0]
        points.append((0.0, first["held_out_start"], first.get("held_out_accuracy_start")))
    points += [
        (float(r["tokens"]), r["held_out_loss"], r.get("held_out_accuracy"))
        for r in records
        if is_number(r.get("held_out_loss"))
    ]
    return Curve(
        tokens=np.array([p[0] for p in points]),
        loss=np.array([float(p[1]) for p in points]),
        accuracy=np.array([float(p[2]) if is_number(p[2]) else math.nan for p in points]),
    )


def _health(places: tuple[str, ...], rows: list[Any], tail: deque[list[list[float]]]) -> Health | None:
    if not rows:
        return None
    tokens, entropy, dead, collapsed, left_behind = np.array(rows, np.float64).transpose(1, 0, 2)
    same = [loads for loads in tail if [*map(len, loads)] == [*map(len, tail[-1])]]
    return Health(
        places=places,
        tokens=tokens[:, 0],
        entropy=entropy,
        dead=dead,
        collapsed=collapsed > 0,
        left_behind=left_behind,
        load=tuple(np.mean(layer, axis=0) for layer in zip(*same, strict=True)),
        steps=len(same),
    )


def place_of(layer: Mapping[str, Any]) -> str:
    """A layer of a file as people name it."""
    return clean(wording.place_of(layer.get("stack") or "layers", layer["layer"]))


def shares(load: Any) -> list[float]:
    """The load of experts as it stands in a file; a `ValueError` where it is none."""
    if not isinstance(load, list) or not all(is_number(x) and x >= 0 for x in load) or not sum(load) > 0:
        raise ValueError(load)
    return [float(x) for x in load]


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
